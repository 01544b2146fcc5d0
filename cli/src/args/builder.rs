//! Arguments that name a daemon.

use std::path::PathBuf;

use clap::Args;

/// Which daemon works.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Builder options")]
pub(crate) struct BuilderArgs {
    /// Use the daemon at this address: unix://SOCKET, tcp://HOST:PORT, ssh://USER@HOST or docker-container://NAME
    ///
    /// Without it, build uses the one that $BUILDKIT_HOST names. An empty address is this process.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) builder: Option<String>,
    /// Name that the certificate of a tcp:// daemon must have [default: the host's]
    #[arg(long, value_name = "NAME")]
    pub(crate) tlsservername: Option<String>,
    /// Authority that the certificate of a tcp:// daemon must be signed by, as a PEM file
    #[arg(long, value_name = "FILE")]
    pub(crate) tlscacert: Option<PathBuf>,
    /// Certificate to show to a tcp:// daemon, as a PEM file
    #[arg(long, value_name = "FILE")]
    pub(crate) tlscert: Option<PathBuf>,
    /// Key of the certificate, as a PEM file
    #[arg(long, value_name = "FILE")]
    pub(crate) tlskey: Option<PathBuf>,
}
