//! The services as clients see them, over a connection, in the order of their calls.

mod builds;
mod content;
mod frontends;
mod history;
mod hostile;
mod messages;
mod peer;
mod usage;

#[path = "../session/file_sync/go_sender.rs"]
#[expect(
    dead_code,
    clippy::duplicate_mod,
    reason = "private to the tests of transfers, which use more of it"
)]
mod go_sender;
