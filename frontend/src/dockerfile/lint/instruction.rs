//! Rules about single instructions, as they take effect.

use slipway_spec::llb::Lines;

use super::{Linter, rules};
use crate::dockerfile::ast::Pair;
use crate::dockerfile::go_format::quoted;
use crate::dockerfile::instruction::{Command, Instruction};

/// Where a stage has the instructions of which only the last one counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct UsedOnce {
    cmd: Option<Lines>,
    entrypoint: Option<Lines>,
    healthcheck: Option<Lines>,
}

impl Linter {
    /// Looks at an instruction of which a stage should have one. The earlier one is what should go.
    pub(crate) fn used_once(&self, command: &Command, used: &mut UsedOnce) {
        let place = match &command.instruction {
            Instruction::Cmd(_) => &mut used.cmd,
            Instruction::Entrypoint(_) => &mut used.entrypoint,
            Instruction::Healthcheck(_) => &mut used.healthcheck,
            _ => return,
        };
        if let Some(lines) = place.replace(command.lines) {
            let message = format!(
                "Multiple {} instructions should not be used in the same stage because only the last one will be used",
                command.keyword
            );
            self.report(&rules::MULTIPLE_INSTRUCTIONS_DISALLOWED, lines, message);
        }
    }

    /// Looks at a `CMD` or `ENTRYPOINT` that is one string for the default shell.
    pub(crate) fn shell_form(&self, command: &Command) {
        let message = format!(
            "JSON arguments recommended for {} to prevent unintended behavior related to OS signals",
            command.keyword
        );
        self.report(&rules::JSON_ARGS_RECOMMENDED, command.lines, message);
    }

    /// Looks at a pair of `ENV` or `LABEL`.
    pub(crate) fn pair(&self, command: &Command, pair: &Pair) {
        if pair.legacy {
            let keyword = &command.keyword;
            let message = format!(
                "\"{keyword} key=value\" should be used instead of legacy \"{keyword} key value\" format"
            );
            self.report(&rules::LEGACY_KEY_VALUE_FORMAT, command.lines, message);
        }
    }

    /// Looks at the first `WORKDIR` of a chain of stages.
    pub(crate) fn first_workdir(&self, path: &str, lines: Lines) {
        if !path.starts_with('/') {
            let message = format!(
                "Relative workdir {} can have unexpected results if the base image changes",
                quoted(path)
            );
            self.report(&rules::WORKDIR_RELATIVE_PATH, lines, message);
        }
    }

    /// Looks at a port of `EXPOSE`, unless it is wrong altogether.
    pub(crate) fn port(&self, text: &str, lines: Lines) {
        let mut parts = text.rsplitn(3, ':');
        let container = parts.next().unwrap_or_default();
        let has_host = parts.any(|part| !part.is_empty());
        let (port, protocol) = container.split_once('/').unwrap_or((container, ""));
        let lower = protocol.to_lowercase();
        if port.is_empty() || !matches!(lower.as_str(), "" | "tcp" | "udp" | "sctp") {
            return;
        }
        if protocol != lower {
            let message =
                format!("Defined protocol '{text}' in EXPOSE instruction should be lowercase");
            self.report(&rules::EXPOSE_PROTO_CASING, lines, message);
        }
        if has_host {
            let message = format!(
                "EXPOSE instruction should not define an IP address or host-port mapping, found '{text}'"
            );
            self.report(&rules::EXPOSE_INVALID_FORMAT, lines, message);
        }
    }
}
