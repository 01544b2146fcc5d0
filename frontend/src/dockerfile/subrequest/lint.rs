//! What `frontend.lint` answers.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::json::{Location, SourceText};
use crate::dockerfile::lint::Finding;

/// Everything that was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LintResults {
    /// Broken rules, in the order in which they were found.
    #[serde(default, serialize_with = "nothing_is_null", deserialize_with = "null_is_nothing")]
    pub warnings: Vec<LintWarning>,
    /// The files that locations are in.
    #[serde(default, deserialize_with = "null_is_nothing")]
    pub sources: Vec<SourceText>,
    /// Why the file cannot be built, if so.
    #[serde(default, rename = "buildError", skip_serializing_if = "Option::is_none")]
    pub build_error: Option<BuildProblem>,
}

/// A broken rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LintWarning {
    /// The rule.
    #[serde(rename = "ruleName")]
    pub rule_name: String,
    /// What the rule says.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Where to read about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub url: String,
    /// How it is broken.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Where.
    pub location: Location,
}

/// Why a file cannot be built.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BuildProblem {
    /// What is wrong.
    pub message: String,
    /// Where.
    pub location: Location,
}

fn nothing_is_null<S: Serializer>(
    list: &Vec<LintWarning>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    if list.is_empty() { serializer.serialize_none() } else { list.serialize(serializer) }
}

fn null_is_nothing<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl LintWarning {
    pub(super) fn of(finding: &Finding) -> Self {
        Self {
            rule_name: finding.rule.name.into(),
            description: finding.rule.description.into(),
            url: finding.rule.url.into(),
            detail: finding.message.clone(),
            location: Location::of(finding.lines),
        }
    }

    fn first_line(&self) -> Option<i32> {
        self.location.ranges.first().map(|range| range.start.line)
    }
}

impl LintResults {
    /// Shows every broken rule with the lines of the file, in the order of the file. `filename` is what the user calls
    /// the file, if that is not how the frontend knows it.
    pub fn to_text(&self, filename: Option<&str>) -> String {
        let mut warnings: Vec<&LintWarning> = self.warnings.iter().collect();
        warnings.sort_by(|a, b| {
            let by_line = a.first_line().cmp(&b.first_line());
            let nowhere = a.first_line().is_none() && b.first_line().is_none();
            if nowhere { a.rule_name.cmp(&b.rule_name) } else { by_line }
        });
        let mut text = String::new();
        for warning in warnings {
            text.push_str(&format!("\nWARNING: {}", warning.rule_name));
            if !warning.url.is_empty() {
                text.push_str(&format!(" - {}", warning.url));
            }
            text.push_str(&format!("\n{}\n", warning.detail));
            text.push_str(&self.excerpt(&warning.location, filename));
        }
        text
    }

    /// Shows the lines of a location; nothing when it is in none of the files.
    pub fn excerpt(&self, location: &Location, filename: Option<&str>) -> String {
        let index = usize::try_from(location.source_index).ok();
        let Some(source) = index.and_then(|index| self.sources.get(index)) else {
            return String::new();
        };
        source.excerpt(&location.ranges, filename.unwrap_or(&source.filename))
    }
}
