//! `EXPOSE`.

use std::net::IpAddr;

use slipway_spec::image_config::Empty;

use super::super::expand::Lexer;
use super::super::go_format::plain_list;
use super::super::problem::{Problem, Result};
use super::Builder;

impl Builder<'_> {
    pub(super) fn expose(&mut self, words: &[String]) -> Result<()> {
        let lexer = Lexer::new(self.plan.escape);
        let expanded: std::result::Result<Vec<Vec<String>>, String> =
            words.iter().map(|word| lexer.words(word, &self.out.env)).collect();
        let mut ports = vec![];
        for word in expanded.map_err(Problem::new)?.iter().flatten() {
            self.lint.port(word, self.lines);
            ports.extend(parse(word)?);
        }
        self.history(format!("EXPOSE {}", plain_list(&ports)), false);
        self.out.config.config.exposed_ports.extend(ports.into_iter().map(|port| (port, Empty {})));
        Ok(())
    }
}

/// Reads `[[ip:]host:]port[-end][/protocol]`. Address and host port are checked and mean nothing for an image.
fn parse(text: &str) -> Result<Vec<String>> {
    let mut parts = text.rsplitn(3, ':');
    let container = parts.next().unwrap_or_default();
    let host = parts.next().unwrap_or_default();
    let address = parts.next().unwrap_or_default();
    let (ports, protocol) = container.split_once('/').unwrap_or((container, ""));
    let invalid = |reason: &str| Problem::new(format!("invalid port: {text:?}: {reason}"));
    if ports.is_empty() {
        return Err(invalid("no port specified"));
    }
    let protocol = match protocol.to_lowercase() {
        empty if empty.is_empty() => "tcp".into(),
        known if matches!(known.as_str(), "tcp" | "udp" | "sctp") => known,
        _ => return Err(invalid(&format!("invalid proto: {protocol}"))),
    };
    if !address.is_empty() {
        let bare =
            address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
        bare.parse::<IpAddr>()
            .map_err(|_| Problem::new(format!("invalid IP address: {address}")))?;
    }
    let (first, last) =
        range(ports).ok_or_else(|| Problem::new(format!("invalid containerPort: {ports}")))?;
    if !host.is_empty() {
        let (from, to) =
            range(host).ok_or_else(|| Problem::new(format!("invalid hostPort: {host}")))?;
        if to - from != last - first && last != first {
            let message = format!(
                "invalid ranges specified for container and host Ports: {ports} and {host}"
            );
            return Err(Problem::new(message));
        }
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

fn range(text: &str) -> Option<(u16, u16)> {
    let number = |text: &str| text.parse::<u16>().ok();
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(text)?, number(text)?),
    };
    (first <= last).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports() {
        for (text, expected) in [
            ("80", &["80/tcp"][..]),
            ("80/UDP", &["80/udp"]),
            ("80-82/sctp", &["80/sctp", "81/sctp", "82/sctp"]),
            ("8080:80", &["80/tcp"]),
            ("1-9:80", &["80/tcp"]),
            ("127.0.0.1:8080:80", &["80/tcp"]),
            ("127.0.0.1::80", &["80/tcp"]),
            ("[::1]:8080:80/tcp", &["80/tcp"]),
            ("::1:8080:80", &["80/tcp"]),
            ("0", &["0/tcp"]),
            ("65535", &["65535/tcp"]),
            ("80-80", &["80/tcp"]),
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn mistakes_are_told() {
        for (text, message) in [
            ("/tcp", "invalid port: \"/tcp\": no port specified"),
            ("80/icmp", "invalid port: \"80/icmp\": invalid proto: icmp"),
            ("x", "invalid containerPort: x"),
            ("65536", "invalid containerPort: 65536"),
            ("82-80", "invalid containerPort: 82-80"),
            ("x:80", "invalid hostPort: x"),
            ("1-2:80-90", "invalid ranges specified for container and host Ports: 80-90 and 1-2"),
            ("a:1:80", "invalid IP address: a"),
        ] {
            assert_eq!(parse(text).unwrap_err().message, message, "{text}");
        }
    }
}
