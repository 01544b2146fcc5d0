//! Where the result of a daemon's build goes.

use std::path::{Path, PathBuf};

use slipway_client::session::content::ContentFolder;
use slipway_client::session::file_send::{Destination, OutputStream};
use slipway_client::{BuildRequest, SessionServices, Typed, build};
use slipway_engine::exporter::OutputSink;

use super::load::Loading;

use crate::args::build::BuildArgs;

use crate::command::Context;
use crate::execute;
use crate::failure::Failure;
use crate::output::{Dest, OutputKind, OutputSpec, describe};

/// What is done with one output on this side.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// Nothing: the daemon keeps or pushes it.
    Builder,
    /// It goes into the store of this machine.
    Store,
    /// Its files go into a folder.
    Folder(PathBuf),
    /// It is written as a layout.
    Layout(PathBuf),
    /// It is written as one stream.
    Stream(Dest),
}

/// The outputs of a build.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Outputs {
    list: Vec<(Typed, Place)>,
    /// Whether nobody said what is to become of the result.
    pub(super) keeps_nothing: bool,
}

impl Outputs {
    /// Completes the outputs. That they make sense was seen when the plan was made.
    pub(super) fn resolve(args: &BuildArgs) -> Result<Self, Failure> {
        let mut list = args
            .outputs
            .iter()
            .filter(|output| output.kind != OutputKind::CacheOnly)
            .map(one)
            .collect::<Result<Vec<_>, _>>()?;
        let pushed = |list: &[(Typed, Place)]| list.iter().any(|(typed, _)| typed.kind == "image");
        if args.push && !pushed(&list) {
            list.push((typed("image"), Place::Builder));
        }
        if args.push {
            for (typed, _) in list.iter_mut().filter(|(typed, _)| typed.kind == "image") {
                typed.attrs.insert("push".into(), "true".into());
            }
        }
        if args.load && !list.iter().any(|(_, place)| *place == Place::Store) {
            list.push((typed("oci"), Place::Store));
        }
        for (typed, _) in &mut list {
            if !matches!(typed.kind.as_str(), "image" | "oci" | "docker") {
                continue;
            }
            describe(&mut typed.attrs, &args.tags, &args.annotations);
        }
        let layouts = list.iter().filter(|(_, place)| matches!(place, Place::Layout(_))).count();
        if layouts > 1 {
            return Err(Failure::new("only one output can be a layout in a folder"));
        }
        Ok(Self { keeps_nothing: args.outputs.is_empty() && list.is_empty(), list })
    }

    /// Adds the outputs to a request, and where they go to what the daemon may ask for. What is returned must live until
    /// the build has ended.
    pub(super) fn offer(
        self,
        request: &mut BuildRequest,
        services: &mut SessionServices,
        context: &Context,
    ) -> Result<Option<Loading>, Failure> {
        let mut loading = None;
        for (number, (typed, place)) in self.list.into_iter().enumerate() {
            let destination = match place {
                Place::Builder => None,
                Place::Store => {
                    let (started, stream) = Loading::start(context)?;
                    loading = Some(started);
                    Some(Destination::stream(Box::new(stream)))
                }
                Place::Folder(folder) => Some(Destination::Folder(folder)),
                Place::Layout(folder) => {
                    let layout = layout(&folder)?;
                    services.stores.insert(build::EXPORT_STORE.into(), layout.clone());
                    request.image_layout = Some(layout);
                    None
                }
                Place::Stream(dest) => {
                    let output = execute::sink(Some(&dest), context)?;
                    Some(Destination::stream(Box::new(Sink(output))))
                }
            };
            services.outputs.extend(destination.map(|destination| (number, destination)));
            request.exports.push(typed);
        }
        Ok(loading)
    }
}

fn layout(folder: &Path) -> Result<ContentFolder, Failure> {
    ContentFolder::writable(folder)
        .map_err(|error| Failure::new(format!("cannot use {}: {error}", folder.display())))
}

fn typed(kind: &str) -> Typed {
    Typed { kind: kind.into(), ..Typed::default() }
}

fn one(output: &OutputSpec) -> Result<(Typed, Place), Failure> {
    let kind = match output.kind {
        OutputKind::Registry => OutputKind::Image,
        kind => kind,
    };
    let mut typed = Typed { kind: kind.as_str().into(), attrs: output.attrs.clone() };
    let place = match (kind, &output.dest) {
        (OutputKind::Local, Some(Dest::Path(folder))) => {
            if typed.attrs.get("mode").is_some_and(|mode| mode != "copy") {
                return Err(Failure::new("not supported yet: type=local,mode=delete"));
            }
            Place::Folder(folder.clone())
        }
        (OutputKind::Oci | OutputKind::Docker, Some(Dest::Path(folder))) if output.is_folder() => {
            Place::Layout(folder.clone())
        }
        // It is loaded into the store of this machine, which takes several platforms.
        (OutputKind::Docker, None) => {
            typed.kind = OutputKind::Oci.as_str().into();
            Place::Store
        }
        (OutputKind::Oci | OutputKind::Docker | OutputKind::Tar, Some(dest)) => {
            Place::Stream(dest.clone())
        }
        _ => Place::Builder,
    };
    Ok((typed, place))
}

/// A file or standard output that a daemon writes to.
struct Sink(Box<dyn OutputSink>);

impl OutputStream for Sink {
    fn open(&mut self) -> std::io::Result<&mut dyn std::io::Write> {
        self.0.open()
    }

    fn finish(self: Box<Self>) -> std::io::Result<()> {
        self.0.finish()
    }
}
