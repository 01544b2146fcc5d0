//! `--cache-from` and `--cache-to`, written as buildx has them.

use slipway_engine::cache::CacheEntry;

use crate::output::csv_fields;

/// The caches that one flag names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CacheList(pub(crate) Vec<CacheEntry>);

/// Reads caches: `type=KIND,KEY=VALUE…`, or names of images in a registry, separated by commas.
pub(crate) fn cache_list(text: &str) -> Result<CacheList, String> {
    let fields = csv_fields(text).map_err(|reason| format!("invalid cache {text:?}: {reason}"))?;
    if !text.contains('=') {
        let named = fields.into_iter().filter(|name| !name.is_empty()).map(|name| CacheEntry {
            kind: "registry".into(),
            attrs: [("ref".to_owned(), name)].into(),
        });
        return Ok(CacheList(named.collect()));
    }
    let mut entry = CacheEntry::default();
    for field in fields {
        let Some((key, value)) = field.split_once('=') else {
            return Err(format!("invalid cache {text:?}: {field:?} is not of the form key=value"));
        };
        match key.trim().to_ascii_lowercase().as_str() {
            "type" => entry.kind = value.to_owned(),
            "mode" if !["min", "max"].contains(&value) => {
                return Err(format!("invalid cache {text:?}: mode is min or max, not {value:?}"));
            }
            key => drop(entry.attrs.insert(key.to_owned(), value.to_owned())),
        }
    }
    if entry.kind.is_empty() {
        return Err(format!("invalid cache {text:?}: type= is missing"));
    }
    Ok(CacheList(vec![entry]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_are_written_in_two_ways() {
        let shown = |text: &str| {
            let CacheList(entries) = cache_list(text)?;
            let entries = entries.iter().map(|entry| format!("{} {:?}", entry.kind, entry.attrs));
            Ok::<_, String>(entries.collect::<Vec<_>>().join("; "))
        };
        for (text, expected) in [
            ("r.example/a:1", r#"registry {"ref": "r.example/a:1"}"#),
            ("a,b", r#"registry {"ref": "a"}; registry {"ref": "b"}"#),
            ("", ""),
            ("type=inline", "inline {}"),
            ("type=local,Dest=/a b,mode=max", r#"local {"dest": "/a b", "mode": "max"}"#),
            (r#"type=local,"src=a,b""#, r#"local {"src": "a,b"}"#),
        ] {
            assert_eq!(shown(text).as_deref(), Ok(expected), "{text}");
        }
        for bad in ["ref=a", "type=local,src", "type=registry,ref=a,mode=all", "type=a,\"b"] {
            assert!(shown(bad).is_err(), "{bad}");
        }
    }
}
