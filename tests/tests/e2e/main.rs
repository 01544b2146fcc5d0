//! The program as its users meet it: real Dockerfiles, emulators, registries and image tools.

mod attestations;
mod bad_input;
mod bad_registry;
mod build_flags;
mod cache;
mod caches;
mod check;
mod concurrency;
mod contexts;
mod example;
mod faults;
mod frontends;
mod harness;
mod hostile_input;
mod instructions;
mod interrupt;
mod outputs;
mod platforms;
mod registry;
mod remote;
mod save_load;
mod steps;
mod store_commands;
