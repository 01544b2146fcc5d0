//! YAML, of which JSON is a part, read into plain values: which type one has is for whoever asks to say.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};

use saphyr_parser::{Event, Parser, ScalarStyle};

/// More levels than any description has.
const MAX_DEPTH: usize = 64;
/// More values than any description has. What is named once and used often counts every time.
const MAX_VALUES: usize = 1_000_000;

/// A value as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// Text; where it is not quoted it may be meant as something else.
    Scalar { text: String, quoted: bool },
    /// Values in order.
    List(Vec<Self>),
    /// Values by name.
    Map(BTreeMap<String, Self>),
}

impl Value {
    /// Whether nothing is written here, or that there is nothing.
    pub(super) fn is_null(&self) -> bool {
        matches!(self, Self::Scalar { text, quoted: false }
            if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    fn scalar(text: String, quoted: bool) -> Self {
        Self::Scalar { text, quoted }
    }
}

/// A list or map that has begun.
enum Open {
    List(Vec<Value>),
    Map { entries: BTreeMap<String, Value>, key: Option<String> },
}

struct Reader {
    open: Vec<(Open, usize)>,
    named: HashMap<usize, Value>,
    count: usize,
    done: Option<Value>,
}

/// Reads the first document of a text; `None` when there is none.
///
/// # Errors
/// When it is malformed, names something twice, or is too large.
pub(super) fn parse(text: &str) -> Result<Option<Value>, String> {
    let mut reader = Reader { open: vec![], named: HashMap::new(), count: 0, done: None };
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| error.to_string())?;
        let more = reader.take(event);
        let more = more.map_err(|reason| format!("line {}: {reason}", span.start.line()))?;
        if !more {
            break;
        }
    }
    Ok(reader.done)
}

impl Reader {
    /// Takes what comes next; whether there is more to come.
    fn take(&mut self, event: Event<'_>) -> Result<bool, String> {
        match event {
            Event::Nothing | Event::StreamStart | Event::DocumentStart(_) => {}
            Event::DocumentEnd | Event::StreamEnd => return Ok(false),
            Event::Scalar(text, style, anchor, tag) => {
                let text_tag = tag.is_some_and(|tag| tag.suffix == "str");
                let quoted = style != ScalarStyle::Plain || text_tag;
                self.put(Value::scalar(text.into_owned(), quoted), anchor)?;
            }
            Event::Alias(anchor) => {
                let known = self.named.get(&anchor).cloned();
                let value = known.ok_or("a name is used inside of what it names")?;
                self.put(value, 0)?;
            }
            Event::SequenceStart(anchor, _) => self.begin(Open::List(vec![]), anchor)?,
            Event::MappingStart(anchor, _) => {
                self.begin(Open::Map { entries: BTreeMap::new(), key: None }, anchor)?;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let (value, anchor) = match self.open.pop() {
                    Some((Open::List(values), anchor)) => (Value::List(values), anchor),
                    Some((Open::Map { entries, .. }, anchor)) => (Value::Map(entries), anchor),
                    None => return Err("something ends that did not begin".into()),
                };
                self.put(value, anchor)?;
            }
        }
        Ok(true)
    }

    fn begin(&mut self, open: Open, anchor: usize) -> Result<(), String> {
        if self.open.len() >= MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} levels"));
        }
        self.open.push((open, anchor));
        Ok(())
    }

    fn put(&mut self, value: Value, anchor: usize) -> Result<(), String> {
        self.count += size(&value);
        if self.count > MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        if anchor != 0 {
            self.named.insert(anchor, value.clone());
        }
        match self.open.last_mut() {
            None => self.done = Some(value),
            Some((Open::List(values), _)) => values.push(value),
            Some((Open::Map { entries, key }, _)) => match (key.take(), value) {
                (Some(name), value) => match entries.entry(name) {
                    Entry::Vacant(place) => {
                        place.insert(value);
                    }
                    Entry::Occupied(known) => {
                        return Err(format!("{:?} is there twice", known.key()));
                    }
                },
                (None, Value::Scalar { text, .. }) => *key = Some(text),
                (None, _) => return Err("a name must be text".into()),
            },
        }
        Ok(())
    }
}

/// How many values a value is. It is never deep, as its depth was bounded while it was read.
fn size(value: &Value) -> usize {
    match value {
        Value::Scalar { .. } => 1,
        Value::List(values) => 1 + values.iter().map(size).sum::<usize>(),
        Value::Map(entries) => 1 + entries.values().map(size).sum::<usize>(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> Value {
        Value::scalar(text.into(), false)
    }

    fn quoted(text: &str) -> Value {
        Value::scalar(text.into(), true)
    }

    fn map(entries: &[(&str, Value)]) -> Value {
        Value::Map(entries.iter().map(|(name, value)| ((*name).into(), value.clone())).collect())
    }

    #[test]
    fn yaml_and_json_say_the_same() {
        let yaml = "---\n# comment\na: 1\nb:\n- x\n- \"1\"\nc: {d: ~, e: []}\n...\nignored: 1\n";
        let json =
            "{\n\t\"a\": 1,\n\t\"b\": [\"x\", \"1\"],\n\t\"c\": {\"d\": null, \"e\": []}\n}\n";
        let expected = |x: Value, null: &str| {
            map(&[
                ("a", plain("1")),
                ("b", Value::List(vec![x, quoted("1")])),
                ("c", map(&[("d", plain(null)), ("e", Value::List(vec![]))])),
            ])
        };
        assert_eq!(parse(yaml).unwrap().unwrap(), expected(plain("x"), "~"));
        assert_eq!(parse(json).unwrap().unwrap(), expected(quoted("x"), "null"));
        assert_eq!(parse("").unwrap(), None);
        assert!(plain("~").is_null() && plain("").is_null() && !quoted("").is_null());
    }

    #[test]
    fn what_is_named_can_be_used_again() {
        let text = "a: &n [x]\nb: *n\nc: &t !!str 7\n";
        let list = Value::List(vec![plain("x")]);
        let expected = map(&[("a", list.clone()), ("b", list), ("c", quoted("7"))]);
        assert_eq!(parse(text).unwrap().unwrap(), expected);
    }

    #[test]
    fn malformed_and_hostile_texts_are_refused() {
        for bad in
            ["a: [", "a: 1\na: 2", "[x]: 1", "a: *b", "a: &b [*b]", "a:\n\t- b", "\"a", "a: '"]
        {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert!(parse(&"[".repeat(100_000)).is_err());
        let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for level in 1..12 {
            let uses = vec![format!("*a{}", level - 1); 10].join(",");
            bomb.push_str(&format!("a{level}: &a{level} [{uses}]\n"));
        }
        assert!(parse(&bomb).unwrap_err().contains("values"));
        assert_eq!(parse("a: 1\nb: {c: 1, c: 2}\n").unwrap_err(), "line 2: \"c\" is there twice");
    }
}
