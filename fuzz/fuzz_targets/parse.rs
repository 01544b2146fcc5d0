//! Any text is parsed or refused, and all places that are named lie inside it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use slipway_frontend::dockerfile::fuzzing;

fuzz_target!(|text: &str| fuzzing::parse(text));
