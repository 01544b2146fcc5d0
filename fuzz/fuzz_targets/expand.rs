//! Any word is expanded or refused: the first line is variables, the rest is words.
#![no_main]

use libfuzzer_sys::fuzz_target;
use slipway_frontend::dockerfile::fuzzing;

fuzz_target!(|text: &str| fuzzing::expand(text));
