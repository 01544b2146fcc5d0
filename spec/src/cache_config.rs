//! The document of a build cache that is kept in a registry or a folder: which layers the results of steps consist of,
//! by digests that identify the steps (BuildKit's "distributable build cache").
//!
//! The document is the config of an image manifest whose layers are the blobs, or an entry of an index that lists them.
//! An image may carry one for its own layers: then it has the records alone, in base64 in the image's config.

use serde::{Deserialize, Serialize};

use crate::manifest::null_default;
use crate::{Digest, MediaType};

/// What a cache's document may have, in bytes.
pub const MAX_CACHE_CONFIG_BYTES: u64 = 32 * 1024 * 1024;

/// The annotation of a layer with the digest of its uncompressed bytes.
pub const DIFF_ID_ANNOTATION: &str = "containerd.io/uncompressed";

/// The annotation of a layer with the time at which it was made.
pub const CREATED_ANNOTATION: &str = "buildkit/createdat";

/// The annotation of a layer that says what made it.
pub const DESCRIPTION_ANNOTATION: &str = "buildkit/description";

/// The parent of a layer that has none.
pub const NO_PARENT: i64 = -1;

impl MediaType {
    /// The document of a build cache.
    pub fn cache_config() -> Self {
        Self::from("application/vnd.buildkit.cacheconfig.v0")
    }
}

/// The document.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheConfig {
    /// Layers, each with the one below it.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub layers: Vec<CacheLayer>,
    /// Steps, or names of steps.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub records: Vec<CacheRecord>,
}

/// A layer on top of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheLayer {
    /// Its blob.
    pub blob: Digest,
    /// The number of the layer below; [`NO_PARENT`] for a base. What is missing is 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub parent: i64,
}

/// A step, or a name of one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheRecord {
    /// What the step gave: layers with all that is below them.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub layers: Vec<CacheResult>,
    /// What the step gave: lists of layers, whatever is below each of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub chains: Vec<CacheChain>,
    /// What identifies the step; as a rule a digest.
    #[serde(default)]
    pub digest: String,
    /// For each input, the records that may be it.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub inputs: Vec<Vec<CacheInput>>,
}

/// A result by its topmost layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheResult {
    /// The number of the layer.
    pub layer: i64,
    /// When the step ran, in RFC 3339.
    #[serde(default, rename = "createdAt")]
    pub created_at: String,
}

/// A result as a list of layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheChain {
    /// The numbers of the layers, base first.
    #[serde(default, deserialize_with = "null_default")]
    pub layers: Vec<i64>,
    /// When the step ran, in RFC 3339.
    #[serde(default, rename = "createdAt")]
    pub created_at: String,
}

/// A record that another one depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheInput {
    /// Which part of it counts.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub selector: String,
    /// The number of the record.
    pub link: i64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What BuildKit writes, shortened.
    const FOREIGN: &str = r#"{"layers":[
        {"blob":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","parent":-1,
         "annotations":{"mediaType":"x","size":3,"createdAt":"0001-01-01T00:00:00Z"}},
        {"blob":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"}],
      "records":[
        {"digest":"sha256:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"},
        {"layers":[{"layer":1,"createdAt":"2026-08-21T10:11:12.5Z"}],"digest":"random:1",
         "inputs":[[{"selector":"/a","link":0}]]},
        {"chains":[{"layers":[0,1],"createdAt":"2026-08-21T10:11:12.5Z"}],"digest":""},
        {"layers":null,"inputs":null}]}"#;

    #[test]
    fn reads_what_buildkit_writes() {
        let config: CacheConfig = serde_json::from_str(FOREIGN).unwrap();
        assert_eq!(config.layers.iter().map(|l| l.parent).collect::<Vec<_>>(), [NO_PARENT, 0]);
        assert_eq!(config.records.len(), 4);
        assert_eq!(config.records[1].layers[0].layer, 1);
        assert_eq!(config.records[1].inputs[0][0].selector, "/a");
        assert_eq!(config.records[2].chains[0].layers, [0, 1]);
        assert_eq!(config.records[3], CacheRecord::default());
        assert_eq!(serde_json::from_str::<CacheConfig>("{}").unwrap(), CacheConfig::default());
        assert_eq!(
            serde_json::from_str::<CacheConfig>(r#"{"layers":null,"records":null}"#).unwrap(),
            CacheConfig::default()
        );
    }

    #[test]
    fn is_written_as_buildkit_reads_it() {
        let digest = |c: &str| format!("sha256:{}", c.repeat(64));
        let layer = |c: &str, parent| CacheLayer { blob: digest(c).parse().unwrap(), parent };
        let created_at = "2026-08-21T10:11:12.5Z".to_owned();
        let config = CacheConfig {
            layers: vec![layer("a", NO_PARENT), layer("b", 0), layer("c", 1)],
            records: vec![
                CacheRecord {
                    layers: vec![CacheResult { layer: 0, created_at: created_at.clone() }],
                    digest: digest("d"),
                    ..CacheRecord::default()
                },
                CacheRecord {
                    chains: vec![CacheChain { layers: vec![2], created_at }],
                    digest: digest("e"),
                    inputs: vec![vec![CacheInput { selector: "s".into(), link: 0 }]],
                    ..CacheRecord::default()
                },
            ],
        };
        let expected = format!(
            concat!(
                r#"{{"layers":[{{"blob":"{a}","parent":-1}},{{"blob":"{b}"}},{{"blob":"{c}","parent":1}}],"#,
                r#""records":[{{"layers":[{{"layer":0,"createdAt":"2026-08-21T10:11:12.5Z"}}],"digest":"{d}"}},"#,
                r#"{{"chains":[{{"layers":[2],"createdAt":"2026-08-21T10:11:12.5Z"}}],"digest":"{e}","#,
                r#""inputs":[[{{"selector":"s","link":0}}]]}}]}}"#
            ),
            a = digest("a"),
            b = digest("b"),
            c = digest("c"),
            d = digest("d"),
            e = digest("e"),
        );
        let written = serde_json::to_string(&config).unwrap();
        assert_eq!(written, expected);
        assert_eq!(serde_json::from_str::<CacheConfig>(&written).unwrap(), config);
    }
}
