//! The signals of Linux, for `STOPSIGNAL`.

const NAMES: [&str; 35] = [
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL",
    "PIPE", "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP",
    "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ", "RTMIN",
];

/// Returns whether text is a number other than 0, or a name with or without `SIG`.
pub(super) fn is_known(text: &str) -> bool {
    if let Ok(number) = text.parse::<i64>() {
        return number != 0;
    }
    let upper = text.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = |prefix: &str, most: u32| {
        let offset = name.strip_prefix(prefix).and_then(|rest| rest.parse::<u32>().ok());
        offset.is_some_and(|offset| (1..=most).contains(&offset))
    };
    NAMES.contains(&name) || name == "RTMAX" || real_time("RTMIN+", 15) || real_time("RTMAX-", 14)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals() {
        for good in ["9", "64", "SIGTERM", "sigterm", "KILL", "rtmin+3", "SIGRTMAX-14", "RTMAX"] {
            assert!(is_known(good), "{good}");
        }
        for bad in ["", "0", "SIGNOPE", "RTMIN+16", "RTMAX-0", "SIGSIGTERM"] {
            assert!(!is_known(bad), "{bad}");
        }
    }
}
