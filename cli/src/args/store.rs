//! Arguments of the commands that look after disk space.

use clap::Args;

/// Arguments of `prune`.
#[derive(Args, Debug)]
pub(crate) struct PruneArgs {
    /// Remove all unused cache, not only what no image and no recent build refers to; with --images all images
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Remove untagged images too
    #[arg(long)]
    pub(crate) images: bool,
}

/// Arguments of `du`.
#[derive(Args, Debug)]
pub(crate) struct DuArgs {
    /// Show everything known about each record
    #[arg(short, long)]
    pub(crate) verbose: bool,
}
