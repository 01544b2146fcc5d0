//! Names of variables that look as if their values were secret.

use slipway_spec::llb::Lines;

use super::{Linter, rules};
use crate::dockerfile::go_format::quoted;

/// Words that tell of a secret …
const SECRET: [&str; 10] = [
    "apikey",
    "auth",
    "credential",
    "credentials",
    "key",
    "password",
    "pword",
    "passwd",
    "secret",
    "token",
];

/// … unless one of these is there, too.
const HARMLESS: [&str; 3] = ["public", "file", "version"];

impl Linter {
    /// Looks at the name of a variable that `ARG` or `ENV` sets.
    pub(crate) fn secret(&self, instruction: &str, key: &str, lines: Lines) {
        if is_secret(key) {
            let message = format!(
                "Do not use ARG or ENV instructions for sensitive data ({instruction} {})",
                quoted(key)
            );
            self.report(&rules::SECRETS_USED_IN_ARG_OR_ENV, lines, message);
        }
    }
}

fn is_secret(key: &str) -> bool {
    let has = |words: &[&str]| {
        key.split('_').any(|part| words.iter().any(|word| word.eq_ignore_ascii_case(part)))
    };
    has(&SECRET) && !has(&HARMLESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_tell() {
        for key in ["KEY", "api_key", "DATABASE_PASSWORD", "secret_MESSAGE", "a_Token_b", "_auth_"]
        {
            assert!(is_secret(key), "{key}");
        }
        for key in
            ["MONKEY", "KEYBOARD", "PUBLIC_KEY", "TOKEN_FILE", "token_version", "super-secret", ""]
        {
            assert!(!is_secret(key), "{key}");
        }
    }
}
