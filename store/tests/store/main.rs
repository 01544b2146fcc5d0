//! The store as its users see it: several processes on one root, damaged and full disks, hostile archives.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod archives;
mod damage;
mod disk;
mod harness;
mod processes;
mod prune;
mod view;
