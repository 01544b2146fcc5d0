//! A bill of materials learns which layers its files are in (SPDX specification 2.3, "File information").

use std::sync::Arc;

use serde_json::{Map, Value};
use slipway_spec::Digest;
use slipway_store::layer::stack::FileKind;
use slipway_store::layer::{Follow, LayerStack};
use slipway_store::pack::LayerBlob;
use slipway_store::snapshot::LayerId;
use slipway_store::tree::{Kind, Tree, clean};
use slipway_store::{Error, ErrorKind, Store};

use super::SPDX;
use super::reading::Said;
use crate::error::Result;

/// The versions whose documents are understood.
const VERSIONS: [&str; 3] = ["SPDX-2.1", "SPDX-2.2", "SPDX-2.3"];

/// Completes what the result itself is made of: files that have no comment get one with their layer. What is not such a
/// document stays as it is. Blocks.
///
/// # Errors
/// When a layer cannot be read.
pub(crate) fn supplement(said: &mut Said, layers: &mut Layers<'_>) -> Result<()> {
    if !said.core || said.predicate_type != SPDX {
        return Ok(());
    }
    let Ok(Value::Object(mut document)) = serde_json::from_str(said.predicate.get()) else {
        return Ok(());
    };
    let version = document.get("spdxVersion").and_then(Value::as_str);
    if !version.is_some_and(|version| VERSIONS.contains(&version)) || !sign(&mut document) {
        return Ok(());
    }
    comment(&mut document, layers)?;
    for package in items(&mut document, "packages") {
        comment(package, layers)?;
    }
    said.predicate =
        serde_json::value::to_raw_value(&document).expect("documents have string keys only");
    Ok(())
}

/// Names this program among those who made the document; `false` where there is no room for that.
fn sign(document: &mut Map<String, Value>) -> bool {
    let info = document.entry("creationInfo").or_insert(Value::Null);
    if info.is_null() {
        *info = Value::Object(Map::new());
    }
    let Some(info) = info.as_object_mut() else { return false };
    let creators = info.entry("creators").or_insert(Value::Null);
    if creators.is_null() {
        *creators = Value::Array(vec![]);
    }
    let Some(creators) = creators.as_array_mut() else { return false };
    creators.push(concat!("Tool: slipway-", env!("CARGO_PKG_VERSION")).into());
    true
}

fn items<'a>(
    parent: &'a mut Map<String, Value>,
    key: &str,
) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    let list = parent.get_mut(key).and_then(Value::as_array_mut);
    list.into_iter().flatten().filter_map(Value::as_object_mut)
}

fn comment(parent: &mut Map<String, Value>, layers: &mut Layers<'_>) -> Result<()> {
    for file in items(parent, "files") {
        if file.get("comment").and_then(Value::as_str).is_some_and(|text| !text.is_empty()) {
            continue;
        }
        let Some(name) = file.get("fileName").and_then(Value::as_str) else { continue };
        if let Some(digest) = layers.find(name)? {
            file.insert("comment".into(), format!("layerID: {digest}").into());
        }
    }
    Ok(())
}

/// The layers of a result, of which none is opened before it must be.
#[derive(Debug)]
pub(crate) struct Layers<'a> {
    store: &'a Store,
    layers: &'a [LayerId],
    blobs: &'a [LayerBlob],
    /// The topmost first.
    opened: Vec<Opened>,
}

#[derive(Debug)]
enum Opened {
    Tree(Arc<Tree>),
    Folder(LayerStack),
}

impl<'a> Layers<'a> {
    /// `blobs` are the blobs of `layers`, base first.
    pub(crate) fn new(store: &'a Store, layers: &'a [LayerId], blobs: &'a [LayerBlob]) -> Self {
        Self { store, layers, blobs, opened: vec![] }
    }

    /// Returns the topmost layer that has a path, even if that was removed again.
    fn find(&mut self, name: &str) -> Result<Option<&'a Digest>> {
        let path = clean(name.as_bytes());
        if path.is_empty() {
            return Ok(None);
        }
        for (depth, blob) in self.blobs.iter().rev().enumerate() {
            if depth == self.opened.len() {
                self.opened.push(self.open(self.layers.len() - 1 - depth)?);
            }
            if self.opened[depth].has(&path)? {
                return Ok(Some(&blob.descriptor.digest));
            }
        }
        Ok(None)
    }

    fn open(&self, at: usize) -> Result<Opened> {
        let layer = self.layers[at];
        if let Some(tree) = self.store.pending_tree(layer) {
            return Ok(Opened::Tree(tree));
        }
        let folder = self.store.ensure_folder(layer, &self.layers[..at])?;
        Ok(Opened::Folder(self.store.stack_folders(&[folder])?))
    }
}

impl Opened {
    fn has(&self, path: &[u8]) -> Result<bool> {
        match self {
            Self::Tree(tree) => {
                Ok(tree.get(path).is_some_and(|entry| entry.kind != Kind::Whiteout))
            }
            Self::Folder(stack) => {
                let found = stack.lookup(path, Follow::None).map_err(|error| {
                    Error::new(ErrorKind::Io, "cannot read a layer").because(error)
                })?;
                Ok(found.is_some_and(|found| found.metadata.kind != FileKind::Socket))
            }
        }
    }
}
