//! Rules that need no more than the parsed file.

use slipway_spec::llb::Lines;

use super::{Linter, rules};
use crate::dockerfile::ast::{Args, Node};
use crate::dockerfile::document::Document;
use crate::dockerfile::go_format::quoted;
use crate::dockerfile::instruction::{Command, Instruction};

/// Names that mean something else where a stage is named.
const RESERVED: [&str; 2] = ["context", "scratch"];

impl Linter {
    /// Looks at lines that end an instruction with a blank line inside.
    pub(crate) fn empty_continuations(&self, lines: &[Lines]) {
        for lines in lines {
            let message = "Empty continuation line".to_owned();
            self.report(&rules::NO_EMPTY_CONTINUATION, *lines, message);
        }
    }

    /// Looks at an instruction that may still turn out to be wrong.
    pub(crate) fn node(&self, node: &Node) {
        let upper = node.keyword.to_uppercase();
        if upper != "FROM" && upper != "MAINTAINER" {
            return;
        }
        let lint = self.under(&node.comments);
        if upper == "MAINTAINER" {
            let message = "Maintainer instruction is deprecated in favor of using label";
            lint.report(&rules::MAINTAINER_DEPRECATED, node.lines, message.into());
            return;
        }
        let Args::Words(words) = &node.args else { return };
        if let [_, _, name] = words.as_slice()
            && *name != name.to_lowercase()
        {
            let message = format!("Stage name '{name}' should be lowercase");
            lint.report(&rules::STAGE_NAME_CASING, node.lines, message);
        }
        // A keyword that mixes cases is another rule's business.
        let from = &node.keyword;
        if let [_, word, _, ..] = words.as_slice() {
            let wanted = match Casing::of(from) {
                Some(Casing::Lower) => word.to_lowercase(),
                Some(Casing::Upper) => word.to_uppercase(),
                None => return,
            };
            if *word != wanted {
                let message = format!("'{word}' and '{from}' keywords' casing do not match");
                lint.report(&rules::FROM_AS_CASING, node.lines, message);
            }
        }
    }

    /// Looks at the comment above an instruction that defines something.
    pub(crate) fn description(&self, command: &Command) {
        let (kind, names): (_, Vec<&str>) = match &command.instruction {
            Instruction::From(from) => ("FROM", from.name.as_deref().into_iter().collect()),
            Instruction::Arg(args) => ("ARG", args.iter().map(|arg| arg.key.as_str()).collect()),
            _ => return,
        };
        let (Some(comment), Some(first)) = (command.comments.last(), names.first()) else { return };
        let word = comment.split(' ').next().unwrap_or_default();
        if names.contains(&word) {
            return;
        }
        let example = if names.len() > 1 { "<arg_key>" } else { first };
        let message =
            format!("Comment for {kind} should follow the format: `# {example} <description>`");
        let lint = self.under(&command.comments);
        lint.report(&rules::INVALID_DEFINITION_DESCRIPTION, command.lines, message);
    }

    /// Looks at a file that is right as far as it was parsed.
    pub(crate) fn document(&self, document: &Document) {
        self.stage_names(document);
        self.casing(document);
    }

    fn stage_names(&self, document: &Document) {
        let mut seen: Vec<&str> = vec![];
        for stage in &document.stages {
            let Some(name) = stage.from.name.as_deref() else { continue };
            if RESERVED.contains(&name) {
                let message = format!(
                    "Stage name should not use the same name as reserved stage {}",
                    quoted(name)
                );
                self.report(&rules::RESERVED_STAGE_NAME, stage.lines, message);
            }
            if seen.contains(&name) {
                let message =
                    format!("Duplicate stage name {}, stage names should be unique", quoted(name));
                self.report(&rules::DUPLICATE_STAGE_NAME, stage.lines, message);
            }
            seen.push(name);
        }
    }

    fn casing(&self, document: &Document) {
        let keywords = || {
            document.stages.iter().flat_map(|stage| {
                let commands = stage.commands.iter();
                std::iter::once((&stage.keyword, stage.lines))
                    .chain(commands.map(|command| (&command.keyword, command.lines)))
            })
        };
        let count =
            |casing| keywords().filter(|(keyword, _)| Casing::of(keyword) == Some(casing)).count();
        let lower = count(Casing::Lower) > count(Casing::Upper);
        for (keyword, lines) in keywords() {
            let (right, majority) = if lower {
                (keyword.to_lowercase(), "lowercase")
            } else {
                (keyword.to_uppercase(), "uppercase")
            };
            if *keyword != right {
                let message = format!(
                    "Command '{keyword}' should match the case of the command majority ({majority})"
                );
                self.report(&rules::CONSISTENT_INSTRUCTION_CASING, lines, message);
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Casing {
    Lower,
    Upper,
}

impl Casing {
    fn of(word: &str) -> Option<Self> {
        if word == word.to_lowercase() {
            Some(Self::Lower)
        } else if word == word.to_uppercase() {
            Some(Self::Upper)
        } else {
            None
        }
    }
}
