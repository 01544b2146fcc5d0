//! Any ignore file is read or refused, and decides about any path, in steps as at once: paths come before an empty line,
//! patterns after it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use slipway_spec::pattern::{MatchInfo, PatternMatcher, parse_ignore_file};

fuzz_target!(|text: &str| {
    let (paths, patterns) = text.split_once("\n\n").unwrap_or(("a/b", text));
    let Ok(patterns) = parse_ignore_file(patterns.as_bytes()) else { return };
    let Ok(matcher) = PatternMatcher::new(&patterns) else { return };
    for path in paths.lines().take(20) {
        let mut info = MatchInfo::default();
        let mut at = String::new();
        let mut stepwise = false;
        for part in path.split('/').filter(|part| !part.is_empty() && *part != "." && *part != "..") {
            if !at.is_empty() {
                at.push('/');
            }
            at.push_str(part);
            (stepwise, info) = matcher.match_dir_entry(&at, &info);
        }
        // With exceptions a walk may remember less, as upstream's does.
        if !at.is_empty() && !matcher.has_exclusions() {
            assert_eq!(matcher.matches(&at), stepwise, "{at:?} against {patterns:?}");
        }
        matcher.may_skip_dir(&at);
    }
});
