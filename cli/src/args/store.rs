//! Arguments of the commands that look after disk space.

use std::time::Duration;

use clap::Args;
use slipway_engine::config::{DiskSpace, parse_duration};

use super::builder::BuilderArgs;

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "expected seconds or something like 48h".into())
}

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
    /// Remove only cache for which this holds, such as type==regular, description~=RUN or until=48h; all of several must
    /// hold
    #[arg(long = "filter", value_name = "CONDITION")]
    pub(crate) filters: Vec<String>,
    /// Remove only what was not used for this long, such as 48h
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) keep_duration: Option<Duration>,
    /// Leave at least this much cache, such as 10GB or 10%
    #[arg(long, visible_alias = "keep-storage", value_name = "BYTES")]
    pub(crate) reserved_space: Option<DiskSpace>,
    /// Leave at most this much cache
    #[arg(long, value_name = "BYTES")]
    pub(crate) max_used_space: Option<DiskSpace>,
    /// Stop when this much is free on the disk
    #[arg(long, value_name = "BYTES")]
    pub(crate) min_free_space: Option<DiskSpace>,
    /// Whose disk it is.
    #[command(flatten)]
    pub(crate) builder: BuilderArgs,
}

/// Arguments of `du`.
#[derive(Args, Debug)]
pub(crate) struct DuArgs {
    /// Show everything known about each record
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Show only records for which this holds, such as type==exec.cachemount; all of several must hold
    #[arg(long = "filter", value_name = "CONDITION")]
    pub(crate) filters: Vec<String>,
    /// Whose disk it is.
    #[command(flatten)]
    pub(crate) builder: BuilderArgs,
}
