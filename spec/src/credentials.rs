//! Keeping secrets out of what is shown and written down.

/// What stands in the place of a user's name and password.
const MASK: &str = "xxxxx";

/// Returns a URL without the user's name and password in it. What is no URL is returned as it is.
pub fn redact(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.into() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let Some((user, host)) = authority.rsplit_once('@') else { return url.into() };
    let masked = |text: &str| if text.is_empty() { "" } else { MASK };
    let user = match user.split_once(':') {
        Some((name, _)) => format!("{}:{MASK}", masked(name)),
        None => masked(user).to_owned(),
    };
    format!("{scheme}://{user}@{host}{path}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_passwords_are_masked() {
        for (url, shown) in [
            ("https://u:p@h/x.git#main", "https://xxxxx:xxxxx@h/x.git#main"),
            ("https://token@h:8/x?a=b@c", "https://xxxxx@h:8/x?a=b@c"),
            ("https://:p@h", "https://:xxxxx@h"),
            ("https://u:p@q@h/x", "https://xxxxx:xxxxx@h/x"),
            ("https://h/a@b", "https://h/a@b"),
            ("git@h:x", "git@h:x"),
            ("context", "context"),
        ] {
            assert_eq!(redact(url), shown);
        }
    }
}
