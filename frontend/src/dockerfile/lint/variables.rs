//! Rules about variables that nobody set.

use std::collections::BTreeSet;

use slipway_spec::ImageReference;
use slipway_spec::llb::Lines;

use super::{Linter, rules};
use crate::dockerfile::document::Document;
use crate::dockerfile::expand::{Env, Lexer};
use crate::dockerfile::instruction::Instruction;
use crate::dockerfile::suggest::suggest;

/// Arguments that steer the build and are never variables.
const NO_VARIABLES: [&str; 2] = ["BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"];

impl Linter {
    /// Looks at variables of an instruction that are not set. Arguments of the stage may be without a value.
    pub(crate) fn undefined<'a>(
        &self,
        unmatched: &BTreeSet<String>,
        env: &Env,
        declared: impl Iterator<Item = &'a str> + Clone,
        lines: Lines,
    ) {
        for name in unmatched {
            if NO_VARIABLES.contains(&name.as_str()) || declared.clone().any(|known| known == name)
            {
                continue;
            }
            let mut message = format!("Usage of undefined variable '${name}'");
            if let Some(near) = suggest(name, env.names(), true) {
                message.push_str(&format!(" (did you mean ${near}?)"));
            }
            self.report(&rules::UNDEFINED_VAR, lines, message);
        }
    }

    /// Looks at variables of `FROM` that are neither set nor declared before the first stage.
    pub(crate) fn undefined_in_from(
        &self,
        unmatched: &BTreeSet<String>,
        globals: &Env,
        declared: &BTreeSet<String>,
        lines: Lines,
    ) {
        for name in unmatched.iter().filter(|name| !declared.contains(*name)) {
            let mut message = format!("FROM argument '{name}' is not declared");
            let known = globals.names().chain(declared.iter().map(String::as_str));
            if let Some(near) = suggest(name, known, true) {
                message.push_str(&format!(" (did you mean {near}?)"));
            }
            self.report(&rules::UNDEFINED_ARG_IN_FROM, lines, message);
        }
    }

    /// Looks at what base images would be if nobody gave build arguments.
    pub(crate) fn default_bases(&self, document: &Document, predefined: &Env) {
        let lexer = Lexer::new(document.escape);
        let mut env = predefined.clone();
        for command in &document.globals {
            let Instruction::Arg(declarations) = &command.instruction else { continue };
            for declaration in declarations {
                let Some(default) = &declaration.default else { continue };
                // What cannot be expanded fails later, if it is needed.
                let Ok(expansion) = lexer.word(default, &env) else { return };
                env.set(&declaration.key, &expansion.text);
            }
        }
        for stage in &document.stages {
            let base = &stage.from.base;
            let Ok(expansion) = lexer.word(base, &env) else { return };
            if expansion.text.parse::<ImageReference>().is_err() {
                let message = format!(
                    "Default value for ARG {base} results in empty or invalid base image name"
                );
                self.report(&rules::INVALID_DEFAULT_ARG_IN_FROM, stage.lines, message);
            }
        }
    }
}
