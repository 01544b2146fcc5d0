//! `WWW-Authenticate`, as RFC 9110 section 11.6.1 writes it.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// What a registry wants to see before it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A token from the realm.
    Bearer { realm: String, service: Option<String>, scope: Option<String>, error: Option<String> },
    /// Name and password.
    Basic,
}

/// Reads all challenges of an answer, tokens before passwords; unknown schemes are left out.
pub(crate) fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .flat_map(|value| parse(&String::from_utf8_lossy(value.as_bytes())))
        .collect();
    found.sort_by_key(|challenge| matches!(challenge, Challenge::Basic));
    found
}

/// One header may hold several challenges, and the comma that separates challenges also separates
/// the parameters of one. A word followed by `=` is a parameter; any other word starts a challenge.
fn parse(header: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            break;
        }
        let end = rest.find(['=', ',', ' ', '\t']).unwrap_or(rest.len());
        let word = &rest[..end];
        let after = rest[end..].trim_start_matches([' ', '\t']);
        match after.strip_prefix('=') {
            Some(value) if !word.is_empty() => {
                let (value, tail) = parameter_value(value.trim_start_matches([' ', '\t']));
                if let Some((_, parameters)) = found.last_mut() {
                    parameters.push((word.to_ascii_lowercase(), value));
                }
                rest = tail;
            }
            // A stray '='; step over it rather than loop.
            Some(tail) => rest = tail,
            None => {
                found.push((word.to_ascii_lowercase(), Vec::new()));
                rest = after;
            }
        }
    }
    found.into_iter().filter_map(|(scheme, parameters)| typed(&scheme, parameters)).collect()
}

fn parameter_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].into(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            c => value.push(c),
        }
    }
    (value, "")
}

fn typed(scheme: &str, parameters: Vec<(String, String)>) -> Option<Challenge> {
    let mut take = {
        let mut parameters = parameters;
        move |name: &str| {
            let at = parameters.iter().position(|(found, _)| found == name)?;
            Some(parameters.swap_remove(at).1).filter(|value| !value.is_empty())
        }
    };
    match scheme {
        "bearer" => Some(Challenge::Bearer {
            realm: take("realm")?,
            service: take("service"),
            scope: take("scope"),
            error: take("error"),
        }),
        "basic" => Some(Challenge::Basic),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        error: Option<&str>,
    ) -> Challenge {
        let own = |text: Option<&str>| text.map(str::to_owned);
        Challenge::Bearer {
            realm: realm.into(),
            service: own(service),
            scope: own(scope),
            error: own(error),
        }
    }

    #[test]
    fn reads_what_registries_send() {
        for (header, expected) in [
            (
                r#"Bearer realm="https://auth.example/token",service="r.example",scope="repository:a/b:pull,push""#,
                vec![bearer(
                    "https://auth.example/token",
                    Some("r.example"),
                    Some("repository:a/b:pull,push"),
                    None,
                )],
            ),
            (
                r#"bearer  realm = "https://a" , error="insufficient_scope""#,
                vec![bearer("https://a", None, None, Some("insufficient_scope"))],
            ),
            (
                r"Bearer realm=https://a/t?x=1,service=s",
                vec![bearer("https://a/t?x=1", Some("s"), None, None)],
            ),
            (
                r#"Basic realm="Registry, \"inner\"", Bearer realm="https://a""#,
                vec![Challenge::Basic, bearer("https://a", None, None, None)],
            ),
            (r#"Negotiate, Basic realm="x""#, vec![Challenge::Basic]),
            ("Basic", vec![Challenge::Basic]),
            ("Bearer", vec![]),
            (r#"Bearer realm="unterminated"#, vec![bearer("unterminated", None, None, None)]),
            ("=,==,= ,", vec![]),
            ("", vec![]),
            ("Digest realm=\"é\\", vec![]),
        ] {
            assert_eq!(parse(header), expected, "{header}");
        }
    }

    #[test]
    fn tokens_come_before_passwords_over_several_headers() {
        let mut headers = HeaderMap::new();
        headers.append(WWW_AUTHENTICATE, "Basic realm=\"x\"".parse().unwrap());
        headers.append(WWW_AUTHENTICATE, "Bearer realm=\"https://a\"".parse().unwrap());
        assert_eq!(challenges(&headers), [bearer("https://a", None, None, None), Challenge::Basic]);
    }
}
