//! A TOML document, read key by key: what nobody asked for is a warning, what cannot be understood an error with its
//! place.

use std::cell::RefCell;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, ConfigWarning, Position};
use super::size::DiskSpace;
use super::time::parse_duration;

/// The text of a document and what is odd about it.
#[derive(Debug)]
pub(super) struct Document<'t> {
    text: &'t str,
    warnings: RefCell<Vec<ConfigWarning>>,
}

impl<'t> Document<'t> {
    /// Takes a text; nothing is parsed yet.
    pub(super) fn new(text: &'t str) -> Self {
        Self { text: text.strip_prefix('\u{feff}').unwrap_or(text), warnings: RefCell::default() }
    }

    /// Parses the text.
    pub(super) fn root(&self) -> Result<Section<'_, 't>, ConfigError> {
        let table = DeTable::parse(self.text).map_err(|error| {
            let span = error.span().unwrap_or_default();
            ConfigError::syntax(self.position(&span), error.message())
        })?;
        Ok(Section { document: self, path: String::new(), table: table.into_inner() })
    }

    /// Adds a warning about a place.
    pub(super) fn warn(&self, span: &Range<usize>, message: String) {
        let position = self.position(span);
        self.warnings.borrow_mut().push(ConfigWarning { position, message });
    }

    /// Ends the reading and returns the warnings in the order of the text.
    pub(super) fn finish(self) -> Vec<ConfigWarning> {
        let mut warnings = self.warnings.into_inner();
        warnings.sort_by_key(|warning| warning.position);
        warnings
    }

    fn position(&self, span: &Range<usize>) -> Position {
        let mut start = span.start.min(self.text.len());
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        let before = &self.text[..start];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Position {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

/// One table of a document. Keys are taken out of it; [`Section::finish`] warns of the rest.
#[derive(Debug)]
pub(super) struct Section<'d, 't> {
    document: &'d Document<'t>,
    path: String,
    table: DeTable<'t>,
}

/// A value with its name and place.
pub(super) struct Value<'d, 't> {
    document: &'d Document<'t>,
    path: String,
    value: Spanned<DeValue<'t>>,
}

impl<'d, 't> Section<'d, 't> {
    /// Takes a value out. As upstream's parser does, a key that differs in case only counts when there is no other.
    pub(super) fn take(&mut self, name: &str) -> Option<Value<'d, 't>> {
        let found = self
            .table
            .keys()
            .find(|key| key.get_ref() == name)
            .or_else(|| self.table.keys().find(|key| key.get_ref().eq_ignore_ascii_case(name)))?
            .clone();
        let value = self.table.remove(&found)?;
        Some(Value { document: self.document, path: self.path_of(found.get_ref()), value })
    }

    /// Takes values that mean nothing here.
    pub(super) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            if let Some(value) = self.take(name) {
                tracing::debug!(key = value.path, "this setting has no meaning here");
            }
        }
    }

    /// Takes a table out.
    pub(super) fn section(&mut self, name: &str) -> Result<Option<Self>, ConfigError> {
        self.take(name).map(Value::into_section).transpose()
    }

    /// Takes an array of tables out; none when it is missing.
    pub(super) fn sections(&mut self, name: &str) -> Result<Vec<Self>, ConfigError> {
        self.items(name)?.into_iter().map(Value::into_section).collect()
    }

    /// Takes text out; empty text counts as none.
    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, ConfigError> {
        let text = self.take(name).map(Value::into_text).transpose()?;
        Ok(text.filter(|text| !text.is_empty()))
    }

    /// Takes a path out; an empty one counts as none.
    pub(super) fn path(&mut self, name: &str) -> Result<Option<PathBuf>, ConfigError> {
        Ok(self.text(name)?.map(PathBuf::from))
    }

    /// Takes an array of texts out.
    pub(super) fn texts(&mut self, name: &str) -> Result<Option<Vec<String>>, ConfigError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        value.into_items()?.into_iter().map(Value::into_text).collect::<Result<_, _>>().map(Some)
    }

    /// Takes an array of paths out; none when it is missing.
    pub(super) fn paths(&mut self, name: &str) -> Result<Vec<PathBuf>, ConfigError> {
        Ok(self.texts(name)?.unwrap_or_default().into_iter().map(PathBuf::from).collect())
    }

    /// Takes `true` or `false` out.
    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.value.get_ref() {
            DeValue::Boolean(boolean) => Ok(Some(*boolean)),
            _ => Err(value.error("must be true or false")),
        }
    }

    /// Takes a number out that may be 0 and more.
    pub(super) fn number<N: TryFrom<u64>>(&mut self, name: &str) -> Result<Option<N>, ConfigError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let DeValue::Integer(integer) = value.value.get_ref() else {
            return Err(value.error("must be a whole number"));
        };
        let number = u64::from_str_radix(integer.as_str(), integer.radix())
            .ok()
            .and_then(|number| N::try_from(number).ok());
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(value.error(&format!("{} is out of range", integer.as_str()))),
        }
    }

    /// Takes a duration out: a number of seconds, or text such as `48h`.
    pub(super) fn duration(&mut self, name: &str) -> Result<Option<Duration>, ConfigError> {
        self.scalar(name, |text| {
            parse_duration(text).ok_or_else(|| {
                format!("{text:?} is no duration; use seconds or something like \"48h\"")
            })
        })
    }

    /// Takes an amount of disk space out: bytes, text with a unit, or a percentage.
    pub(super) fn disk_space(&mut self, name: &str) -> Result<Option<DiskSpace>, ConfigError> {
        self.scalar(name, |text| {
            text.parse().map_err(|error: super::DiskSpaceError| error.to_string())
        })
    }

    /// Reads a whole number or text the same way; empty text counts as none.
    fn scalar<T>(
        &mut self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let text = match value.value.get_ref() {
            DeValue::String(text) => text.as_ref(),
            DeValue::Integer(integer) if integer.radix() == 10 => integer.as_str(),
            other => {
                let message = format!("must be text or a whole number, not {}", kind(other));
                return Err(value.error(&message));
            }
        };
        if text.is_empty() {
            return Ok(None);
        }
        parse(text).map(Some).map_err(|message| value.error(&message))
    }

    fn items(&mut self, name: &str) -> Result<Vec<Value<'d, 't>>, ConfigError> {
        self.take(name).map_or_else(|| Ok(vec![]), Value::into_items)
    }

    /// Takes everything that is left.
    pub(super) fn into_entries(self) -> impl Iterator<Item = (String, Value<'d, 't>)> {
        let Self { document, path, table } = self;
        table.into_iter().map(move |(key, value)| {
            let name = key.into_inner().into_owned();
            (name.clone(), Value { document, path: join(&path, &name), value })
        })
    }

    /// Warns of every key that nobody took.
    pub(super) fn finish(self) {
        for key in self.table.keys() {
            let message = format!("unknown key {} is ignored", self.path_of(key.get_ref()));
            self.document.warn(&key.span(), message);
        }
    }

    fn path_of(&self, key: &str) -> String {
        join(&self.path, key)
    }
}

impl<'d, 't> Value<'d, 't> {
    /// The value as a table.
    pub(super) fn into_section(self) -> Result<Section<'d, 't>, ConfigError> {
        let error = self.error(&format!("must be a table, not {}", kind(self.value.get_ref())));
        match self.value.into_inner() {
            DeValue::Table(table) => {
                Ok(Section { document: self.document, path: self.path, table })
            }
            _ => Err(error),
        }
    }

    /// The value as text.
    pub(super) fn into_text(self) -> Result<String, ConfigError> {
        match self.value.get_ref() {
            DeValue::String(text) => Ok(text.clone().into_owned()),
            other => Err(self.error(&format!("must be text, not {}", kind(other)))),
        }
    }

    /// The value as an array.
    pub(super) fn into_items(self) -> Result<Vec<Self>, ConfigError> {
        let error = self.error(&format!("must be an array, not {}", kind(self.value.get_ref())));
        let Self { document, path, value } = self;
        match value.into_inner() {
            DeValue::Array(items) => Ok(items
                .into_iter()
                .map(|value| Value { document, path: path.clone(), value })
                .collect()),
            _ => Err(error),
        }
    }

    /// Warns of this value.
    pub(super) fn warn(&self, message: &str) {
        self.document.warn(&self.value.span(), format!("{} {message}", self.path));
    }

    /// Makes an error about this value.
    pub(super) fn error(&self, message: &str) -> ConfigError {
        let position = self.document.position(&self.value.span());
        ConfigError::value(position, format!("{} {message}", self.path))
    }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

/// Joins a dotted path, with quotes where the text needs them too.
fn join(path: &str, key: &str) -> String {
    let is_bare =
        !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    let dot = if path.is_empty() { "" } else { "." };
    if is_bare { format!("{path}{dot}{key}") } else { format!("{path}{dot}{key:?}") }
}
