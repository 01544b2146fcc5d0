//! Blobs as clients read them.

use futures::TryStreamExt as _;
use slipway_spec::Digest;
use slipway_spec::wire::content::content_client::ContentClient;
use slipway_spec::wire::content::{
    AbortRequest, DeleteContentRequest, InfoRequest, ListContentRequest, ListStatusesRequest,
    ReadContentRequest, StatusRequest, UpdateRequest, WriteContentRequest,
};
use tonic::{Code, Status};

use super::go_sender::Folder;
use super::peer::*;

const OCI: Wish<'_> = Wish { attrs: &[], outputs: &[("oci", &[("tar", "true")])] };

async fn read(peer: &Peer, digest: &str, offset: i64, size: i64) -> Result<Vec<u8>, Status> {
    let request = ReadContentRequest { digest: digest.into(), offset, size };
    let stream = ContentClient::new(peer.channel()).read(request).await?;
    let parts: Vec<_> = stream.into_inner().try_collect().await?;
    let mut at = offset;
    Ok(parts
        .into_iter()
        .flat_map(|part| {
            assert_eq!(part.offset, at);
            at += i64::try_from(part.data.len()).unwrap();
            part.data
        })
        .collect())
}

#[tokio::test]
async fn blobs_are_read_whole_and_in_parts() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let folder = Folder::of(&["Dockerfile=FROM scratch\nCOPY a /x/\n", "a=1"]);
    let built = peer.buildx("r", &folder, OCI).await;
    let response = built.response.unwrap().exporter_response;
    let digest = response["containerimage.digest"].as_str();
    let whole = read(&peer, digest, 0, 0).await.unwrap();
    assert_eq!(Digest::of(&whole).to_string(), digest);
    let size = i64::try_from(whole.len()).unwrap();
    assert_eq!(read(&peer, digest, 3, 5).await.unwrap(), &whole[3..8]);
    assert_eq!(read(&peer, digest, size, 0).await.unwrap(), b"");
    let mut content = ContentClient::new(peer.channel());
    let info = content.info(InfoRequest { digest: digest.into() }).await.unwrap().into_inner();
    let info = info.info.unwrap();
    assert_eq!((info.digest.as_str(), info.size), (digest, size));
    assert!(info.created_at.unwrap().seconds > 1_500_000_000);

    let list = |filters: &[&str]| {
        let filters = filters.iter().map(|text| (*text).to_owned()).collect();
        let mut content = content.clone();
        async move {
            let stream = content.list(ListContentRequest { filters }).await?;
            let parts: Vec<_> = stream.into_inner().try_collect().await?;
            let all = parts.into_iter().flat_map(|part| part.info).map(|info| info.digest);
            Ok::<Vec<String>, Status>(all.collect())
        }
    };
    let all = list(&[]).await.unwrap();
    // Layer, config, manifest, index; and the log among what the history has.
    assert!(all.len() >= 5 && all.contains(&digest.to_owned()), "{all:?}");
    assert_eq!(list(&[&format!("digest=={digest}")]).await.unwrap()[0], digest);
    assert_eq!(list(&["labels.\"a/b\""]).await.unwrap(), [""; 0]);
    assert_eq!(list(&["colour"]).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn what_cannot_be_read_is_an_error() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let folder = Folder::of(&["Dockerfile=FROM scratch\nCOPY a /x/\n", "a=1"]);
    let built = peer.buildx("r", &folder, OCI).await;
    let digest = built.response.unwrap().exporter_response["containerimage.digest"].clone();
    let missing = Digest::of(b"nothing").to_string();
    for (digest, offset, size, code) in [
        (missing.as_str(), 0, 0, Code::NotFound),
        ("../../etc/passwd", 0, 0, Code::InvalidArgument),
        ("", 0, 0, Code::InvalidArgument),
        (&digest, -1, 0, Code::OutOfRange),
        (&digest, 0, -1, Code::OutOfRange),
        (&digest, i64::MAX, 0, Code::OutOfRange),
        (&digest, 1, i64::MAX, Code::OutOfRange),
    ] {
        let status = read(&peer, digest, offset, size).await.unwrap_err();
        assert_eq!(status.code(), code, "{digest} {offset} {size}: {status:?}");
    }
}

#[tokio::test]
async fn nothing_can_be_written() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let mut content = ContentClient::new(peer.channel());
    let digest = Digest::of(b"x").to_string();
    let delete = content.delete(DeleteContentRequest { digest }).await.unwrap_err();
    let update = content.update(UpdateRequest::default()).await.unwrap_err();
    let abort = content.abort(AbortRequest { r#ref: "x".into() }).await.unwrap_err();
    let message = WriteContentRequest { data: b"x".as_slice().into(), ..Default::default() };
    let write = content.write(futures::stream::iter([message])).await.unwrap_err();
    for status in [delete, update, abort, write] {
        assert_eq!(status.message(), "read-only content store");
    }
    let status = content.status(StatusRequest { r#ref: "x".into() }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let all = content.list_statuses(ListStatusesRequest::default()).await.unwrap().into_inner();
    assert_eq!(all.statuses, []);
}
