//! Filters over records, as containerd and BuildKit write them: `type==regular,description~=/RUN .*/`.
//!
//! A filter is a list of selectors between commas, all of which must hold; of several filters one is enough. A selector is a
//! field alone (it is present), or a field, an operator and a value: `==`, `!=`, `~=` (a regular expression). Values that are
//! no single word stand in double quotes, expressions also between slashes or bars.

use std::fmt;
use std::str::Chars;

use regex::{Regex, RegexBuilder};

/// Clients send a handful; each regular expression costs time and memory before anything is looked at.
const MAX_SELECTORS: usize = 1000;
/// Longer text is no filter that a person wrote.
const MAX_BYTES: usize = 64 << 10;
/// What one regular expression may take when it is compiled, in bytes.
const EXPRESSION_BYTES: usize = 1 << 20;

/// Filters of which one must hold.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Without any, everything is wanted.
    any: Vec<Vec<Selector>>,
}

#[derive(Clone, Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Clone, Debug)]
enum Test {
    Present,
    Equal(String),
    Different(String),
    Matches(Regex),
}

/// Text that is no filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the filter {filter:?} is not understood: {message}")]
pub struct FilterError {
    filter: String,
    message: String,
}

impl Filter {
    /// Reads filters. An empty one holds for everything, as does the absence of any.
    ///
    /// # Errors
    /// When one is not well formed, or names a field that is not in `fields`: a name that is misspelt must not select what
    /// was not meant. A field that ends in a dot stands for all names that begin with it.
    pub fn parse<S: AsRef<str>>(filters: &[S], fields: &[&str]) -> Result<Self, FilterError> {
        let mut any = Vec::with_capacity(filters.len().min(MAX_SELECTORS));
        let mut left = MAX_SELECTORS;
        for filter in filters {
            let text = filter.as_ref();
            let refuse = |message: String| {
                // Enough to recognise it by.
                FilterError { filter: text.chars().take(200).collect(), message }
            };
            if text.len() > MAX_BYTES {
                return Err(refuse(format!("it is longer than {MAX_BYTES} bytes")));
            }
            let all = Scanner::new(text).selectors(&mut left).map_err(refuse)?;
            for selector in &all {
                let name = selector.path.join(".");
                let known = |field: &&str| match field.strip_suffix('.') {
                    Some(prefix) => selector.path.first().is_some_and(|first| first == prefix),
                    None => **field == name,
                };
                if !fields.iter().any(known) {
                    let names: Vec<&str> =
                        fields.iter().map(|field| field.trim_end_matches('.')).collect();
                    return Err(refuse(format!(
                        "there is no field {name:?}; use {}",
                        names.join(", ")
                    )));
                }
            }
            any.push(all);
        }
        // One that holds for everything makes the others needless.
        if any.iter().any(Vec::is_empty) {
            any.clear();
        }
        Ok(Self { any })
    }

    /// Whether everything is wanted.
    pub fn is_everything(&self) -> bool {
        self.any.is_empty()
    }

    /// Whether a record is wanted. `field` returns the value of one of its fields, and nothing for a field that it lacks or
    /// a flag that is not set.
    pub fn holds(&self, field: impl Fn(&[String]) -> Option<String>) -> bool {
        let holds = |selector: &Selector| {
            let value = field(&selector.path);
            match &selector.test {
                Test::Present => value.is_some(),
                Test::Equal(wanted) => value.as_ref() == Some(wanted),
                // A field that is missing is different from any text but none.
                Test::Different(other) => value.unwrap_or_default() != *other,
                Test::Matches(expression) => expression.is_match(&value.unwrap_or_default()),
            }
        };
        self.any.is_empty() || self.any.iter().any(|all| all.iter().all(holds))
    }
}

struct Scanner<'a> {
    rest: Chars<'a>,
}

impl fmt::Debug for Scanner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Scanner").field(&self.rest.as_str()).finish()
    }
}

type Scanned<T> = Result<T, String>;

impl<'a> Scanner<'a> {
    fn new(text: &'a str) -> Self {
        Self { rest: text.chars() }
    }

    fn peek(&self) -> Option<char> {
        self.rest.clone().next()
    }

    fn skip_spaces(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.rest.next();
        }
    }

    fn eat(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.rest.next();
        }
        found
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let all = self.rest.as_str();
        let end = all.find(|c| !wanted(c)).unwrap_or(all.len());
        self.rest = all[end..].chars();
        &all[..end]
    }

    /// What is next, for people.
    fn here(&self) -> String {
        match self.rest.as_str() {
            "" => "the end".into(),
            rest => format!("{:?}", rest.chars().take(40).collect::<String>()),
        }
    }

    fn selectors(mut self, left: &mut usize) -> Scanned<Vec<Selector>> {
        let mut all = vec![];
        if self.rest.as_str().is_empty() {
            return Ok(all);
        }
        loop {
            *left = left.checked_sub(1).ok_or(format!("more than {MAX_SELECTORS} conditions"))?;
            all.push(self.selector()?);
            self.skip_spaces();
            if self.peek().is_none() {
                return Ok(all);
            }
            if !self.eat(',') {
                return Err(format!("expected a comma before {}", self.here()));
            }
        }
    }

    fn selector(&mut self) -> Scanned<Selector> {
        let mut path = vec![self.field()?];
        while self.eat('.') {
            path.push(self.field()?);
        }
        self.skip_spaces();
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { path, test: Test::Present });
        }
        let operator = self.take_while(|c| matches!(c, '=' | '!' | '~'));
        let test = match operator {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::Different(self.value(false)?),
            "~=" => {
                let text = self.value(true)?;
                let expression = RegexBuilder::new(&text).size_limit(EXPRESSION_BYTES).build();
                // Its message has several lines, the last of which says what is wrong.
                Test::Matches(expression.map_err(|error| {
                    let error = error.to_string();
                    let why =
                        error.lines().last().unwrap_or_default().trim_start_matches("error: ");
                    format!("{text:?} is no regular expression: {why}")
                })?)
            }
            "" => {
                return Err(format!(
                    "expected an operator (\"==\", \"!=\" or \"~=\") before {}",
                    self.here()
                ));
            }
            other => return Err(format!("there is no operator {other:?}; use ==, != or ~=")),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Scanned<String> {
        self.skip_spaces();
        if self.eat('"') {
            return self.quoted('"');
        }
        match self.take_while(|c| c.is_ascii_alphanumeric() || c == '_') {
            "" => Err(format!("expected a field before {}", self.here())),
            name => Ok(name.to_owned()),
        }
    }

    fn value(&mut self, expression: bool) -> Scanned<String> {
        self.skip_spaces();
        match self.peek() {
            Some('"') => {
                self.rest.next();
                return self.quoted('"');
            }
            Some(quote @ ('/' | '|')) if expression => {
                self.rest.next();
                return self.quoted(quote);
            }
            Some(quote @ ('/' | '|')) => {
                return Err(format!("a value that begins with {quote} must be in double quotes"));
            }
            _ => {}
        }
        match self.take_while(|c| c != ',' && !c.is_whitespace() && !c.is_control()) {
            "" => Err(format!("expected a value before {}", self.here())),
            value => Ok(value.to_owned()),
        }
    }

    /// Reads up to a quote, with the escapes of Go's strings.
    fn quoted(&mut self, quote: char) -> Scanned<String> {
        let mut bytes = vec![];
        let open = || format!("the quote {quote} is not closed");
        loop {
            match self.rest.next().ok_or_else(open)? {
                '\n' => return Err(open()),
                '\\' => {
                    let escaped = self.rest.next().ok_or_else(open)?;
                    self.escape(escaped, quote, &mut bytes)?;
                }
                c if c == quote => {
                    return String::from_utf8(bytes)
                        .map_err(|_| "its escapes make no text".to_owned());
                }
                c => bytes.extend(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
    }

    fn escape(&mut self, escaped: char, quote: char, bytes: &mut Vec<u8>) -> Scanned<()> {
        let byte = match escaped {
            'a' => 7,
            'b' => 8,
            't' => b'\t',
            'n' => b'\n',
            'v' => 11,
            'f' => 12,
            'r' => b'\r',
            '\\' => b'\\',
            'x' | 'u' | 'U' => {
                let digits = match escaped {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                let number = self.number(digits, 16)?;
                if escaped == 'x' {
                    u8::try_from(number).map_err(|_| bad_escape())?
                } else {
                    let c = char::from_u32(number).ok_or_else(bad_escape)?;
                    bytes.extend(c.encode_utf8(&mut [0; 4]).as_bytes());
                    return Ok(());
                }
            }
            '0'..='7' => {
                let first = escaped.to_digit(8).ok_or_else(bad_escape)?;
                let number = (first << 6) + self.number(2, 8)?;
                u8::try_from(number).map_err(|_| bad_escape())?
            }
            c if c == quote => u8::try_from(c).map_err(|_| bad_escape())?,
            other => return Err(format!("there is no escape \\{other}")),
        };
        bytes.push(byte);
        Ok(())
    }

    fn number(&mut self, digits: usize, base: u32) -> Scanned<u32> {
        (0..digits).try_fold(0u32, |number, _| {
            let digit = self.rest.next().and_then(|c| c.to_digit(base)).ok_or_else(bad_escape)?;
            number.checked_mul(base).and_then(|n| n.checked_add(digit)).ok_or_else(bad_escape)
        })
    }
}

fn bad_escape() -> String {
    "an escape with a number is not complete".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELDS: &[&str] = &["id", "type", "description", "inuse", "labels."];

    fn holds(filters: &[&str], record: &[(&str, &str)]) -> Result<bool, FilterError> {
        let filter = Filter::parse(filters, FIELDS)?;
        Ok(filter.holds(|path| {
            let name = path.join(".");
            record.iter().find(|(field, _)| *field == name).map(|(_, value)| (*value).to_owned())
        }))
    }

    #[test]
    fn filters_hold_as_containerd_has_it() {
        let record = [
            ("id", "abc"),
            ("type", "regular"),
            ("description", "RUN \"a\", b/c"),
            ("inuse", "true"),
            ("labels.a.b/c", "7"),
        ];
        for (filters, expected) in [
            (&[][..], true),
            (&[""], true),
            (&["id==x", ""], true),
            (&["id==abc"], true),
            (&["id==ab"], false),
            (&["id!=ab"], true),
            (&["id ~= ^a.c$"], true),
            (&["id~=B"], false),
            (&["id~=\"(?i)B\""], true),
            (&["id==abc,type==regular"], true),
            (&["id==abc, type==frontend"], false),
            (&["id==x", "type==regular"], true),
            (&["inuse"], true),
            (&["labels.x"], false),
            (&["labels.x!=1"], true),
            (&["labels.x==\"\""], false),
            (&["labels.x~=^$"], true),
            (&["labels.\"a.b/c\"==7"], true),
            (&["description==\"RUN \\\"a\\\", b/c\""], true),
            (&["description~=/RUN .*, b\\/c/"], true),
            (&["description~=|b/c|"], true),
            (&["description==\"\\x52UN \\042a\\042, \\u0062/c\""], true),
            (&["id==a=b"], false),
            // Where a comma stands the next condition begins.
            (&["description==RUN,inuse"], false),
        ] {
            assert_eq!(holds(filters, &record), Ok(expected), "{filters:?}");
        }
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        let long = "id==".to_owned() + &"x".repeat(MAX_BYTES);
        let many = "id,".repeat(MAX_SELECTORS) + "id";
        let heavy = "id~=(a{1000}){1000}";
        for filter in [
            " ",
            ",",
            "id,",
            "id==",
            "id=x",
            "id===x",
            "id!x",
            "id+x",
            "id==x y",
            "==x",
            "id.",
            ".id",
            "id==\"x",
            "id==\"\\q\"",
            "id==\"\\x4\"",
            "id==\"\\400\"",
            "id==\"\\xff\"",
            "id==/x/",
            "id~=/x",
            "id~=(",
            "id~=\"\\d\"",
            "colour==red",
            "idx",
            "label.x==1",
            "id==\0",
            "\"",
            "id==\"\\U00110000\"",
            &long,
            &many,
            heavy,
        ] {
            let error = holds(&[filter], &[]).expect_err(filter);
            assert!(error.to_string().len() < 1000, "{error}");
        }
        let error = holds(&["tipe==regular"], &[]).unwrap_err().to_string();
        assert_eq!(
            error,
            "the filter \"tipe==regular\" is not understood: there is no field \"tipe\"; use id, type, description, inuse, labels"
        );
    }
}
