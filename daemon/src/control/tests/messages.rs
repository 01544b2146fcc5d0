//! Connections of clients, and what they send.

use prost::Message as _;
use slipway_spec::Digest;
use slipway_spec::llb::pb;
use slipway_spec::wire::gateway::{self, result};
use slipway_transport::channel::Channel;
use slipway_transport::router::Router;
use tokio::io::DuplexStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Request;

/// A client's connection. Dropping it is as if the client were killed.
pub(super) struct Connection {
    pub(super) channel: Channel,
    end: CancellationToken,
    connection: JoinHandle<()>,
}

impl Connection {
    pub(super) async fn open(router: Router) -> Self {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move { router.serve(theirs, std::future::pending()).await });
        Self::over(ours).await
    }

    /// A connection whose other end somebody serves.
    pub(super) async fn over(ours: DuplexStream) -> Self {
        let end = CancellationToken::new();
        let (channel, connection) = Channel::open(ours, end.clone()).await.unwrap();
        Self { channel, end, connection: tokio::spawn(connection) }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end.cancel();
        self.connection.abort();
    }
}

/// Names the build that a call is about.
pub(super) fn tagged<T>(id: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("buildkit-controlapi-buildid", id.parse().unwrap());
    request
}

/// A result of one file system.
pub(super) fn result_of(id: &str) -> gateway::Result {
    let reference = gateway::Ref { id: id.to_owned(), def: None };
    gateway::Result { result: Some(result::Result::Ref(reference)), ..gateway::Result::default() }
}

/// Joins operations, each with its inputs by position, into a definition of the last one's first output.
pub(super) fn definition(ops: Vec<pb::Op>) -> pb::Definition {
    let mut def: Vec<Vec<u8>> = vec![];
    for mut op in ops {
        for input in &mut op.inputs {
            if let Ok(at) = input.digest.parse::<usize>() {
                input.digest = Digest::of(&def[at]).to_string();
            }
        }
        def.push(op.encode_to_vec());
    }
    let last = Digest::of(def.last().unwrap()).to_string();
    let inputs = vec![pb::Input { digest: last, index: 0 }];
    def.push(pb::Op { inputs, ..pb::Op::default() }.encode_to_vec());
    pb::Definition { def, ..pb::Definition::default() }
}

/// An operation on files, over the operation at a position.
pub(super) fn file_op(over: Option<usize>, actions: Vec<pb::file_action::Action>) -> pb::Op {
    let inputs: Vec<pb::Input> =
        over.map(|at| pb::Input { digest: at.to_string(), index: 0 }).into_iter().collect();
    let base = i64::try_from(inputs.len()).unwrap();
    let last = actions.len() - 1;
    let actions = actions.into_iter().enumerate().map(|(at, action)| pb::FileAction {
        input: match at {
            0 if base == 0 => -1,
            0 => 0,
            at => base + i64::try_from(at).unwrap() - 1,
        },
        secondary_input: -1,
        output: if at == last { 0 } else { -1 },
        action: Some(action),
    });
    let op = pb::FileOp { actions: actions.collect() };
    pb::Op { inputs, op: Some(pb::op::Op::File(op)), ..pb::Op::default() }
}

pub(super) fn mkfile(path: &str, data: &str) -> pb::file_action::Action {
    pb::file_action::Action::Mkfile(pb::FileActionMkFile {
        path: path.into(),
        mode: 0o644,
        data: data.into(),
        owner: None,
        timestamp: -1,
    })
}

pub(super) fn mkdir(path: &str) -> pb::file_action::Action {
    pb::file_action::Action::Mkdir(pb::FileActionMkDir {
        path: path.into(),
        mode: 0o755,
        make_parents: true,
        owner: None,
        timestamp: -1,
    })
}

pub(super) fn symlink(old: &str, new: &str) -> pb::file_action::Action {
    pb::file_action::Action::Symlink(pb::FileActionSymlink {
        oldpath: old.into(),
        newpath: new.into(),
        owner: None,
        timestamp: -1,
    })
}
