//! `COPY` and `ADD`.

use slipway_spec::llb::{Copy as CopyAction, FileActions, State};
use slipway_spec::pattern::{PatternMatcher, clean_path};

use super::super::expand::Lexer;
use super::super::files::internal;
use super::super::instruction::Copy;
use super::super::problem::{Problem, Result};
use super::super::settings::is_git;
use super::super::stage::Step;
use super::{Builder, join, name, owner};

impl Builder<'_> {
    pub(super) fn copy(&mut self, copy: &Copy, step: &Step) -> Result<()> {
        let command = &step.command;
        if let Some(flag) = copy.unsupported.first() {
            return Err(Problem::unsupported(&format!("{} {flag}", command.name)));
        }
        let sources = self.expand_all(&copy.sources)?;
        let dest_text = self.expand(&copy.dest)?;
        let chown = self.expand(&copy.chown)?;
        let chmod = self.expand(&copy.chmod)?;
        let (mode, mode_text) = parse_mode(&chmod)?;
        PatternMatcher::new(&copy.exclude)
            .map_err(|error| Problem::new(format!("--exclude: {error}")))?;
        let dest = self.destination(&dest_text);
        let from = match step.source {
            None => self.context.clone(),
            Some(index) => match &self.outcomes[index] {
                Some(outcome) => outcome.state.clone(),
                None => {
                    return Err(Problem::new(format!(
                        "cannot copy from stage {:?}, it needs to be defined before current stage {:?}",
                        copy.from, self.stage.label
                    )));
                }
            },
        };
        let common = CopyAction {
            dest,
            owner: owner(&chown),
            mode,
            mode_text,
            create_dest_path: true,
            exclude_patterns: copy.exclude.clone(),
            ..CopyAction::default()
        };
        let mut history = String::from(command.name);
        for (flag, value) in [("--chown", &chown), ("--chmod", &chmod)] {
            if !value.is_empty() {
                history.push_str(&format!(" {flag}={value}"));
            }
        }
        let mut actions = FileActions::new();
        for source in &sources {
            refuse_remote(source, copy.add)?;
            history.push_str(&format!(" {source}"));
            let path = clean_path(&format!("/{source}"));
            if step.source.is_none() {
                self.context_paths.insert(path.clone());
            }
            let action = CopyAction {
                src: path,
                follow_symlink: true,
                dir_copy_contents: true,
                attempt_unpack: copy.add,
                allow_wildcard: true,
                allow_empty_wildcard: true,
                ..common.clone()
            };
            actions = actions.copy(&from, action);
        }
        // Files written in the Dockerfile come after all others.
        for doc in &copy.inline {
            history.push_str(&format!(" <<{}", doc.name));
            let body = if doc.expand { self.expand_body(&doc.body())? } else { doc.body() };
            let path = join("/", &doc.name);
            let file = FileActions::new().mkfile(&path, 0o644, body.into_bytes(), None, None);
            let file = State::scratch().file(file, internal("preparing inline document"));
            actions = actions.copy(&file, CopyAction { src: path, ..common.clone() });
        }
        history.push_str(&format!(" {dest_text} # buildkit"));
        let lexer = Lexer::new(self.plan.escape);
        let text = name::instruction(&command.code, lexer, &self.out.env);
        let options = self.vertex(&text, command.lines, true, &self.out.platform.clone());
        self.out.state = self.out.state.file(actions, options);
        self.history(history, true);
        Ok(())
    }

    /// Makes a destination absolute. A slash or `/.` at its end stays, because it says that this is a directory.
    fn destination(&self, text: &str) -> String {
        let text = if text.is_empty() || text == "." { "./" } else { text };
        let mut path = join(&self.out.cwd, text);
        if text.ends_with('/') {
            if path != "/" {
                path.push('/');
            }
        } else if text.ends_with("/.") {
            if path != "/" {
                path.push('/');
            }
            path.push('.');
        }
        path
    }

    /// Expands variables in a file's body; quotes mean nothing there, and the escape is always `\`.
    fn expand_body(&self, body: &str) -> Result<String> {
        let lexer = Lexer { ignore_quotes: true, ..Lexer::new('\\') };
        lexer.word(body, &self.out.env).map(|expansion| expansion.text).map_err(Problem::new)
    }
}

fn refuse_remote(source: &str, add: bool) -> Result<()> {
    let git = is_git(source);
    if !git && !source.starts_with("http://") && !source.starts_with("https://") {
        return Ok(());
    }
    Err(match (add, git) {
        (true, true) => Problem::unsupported("ADD from a git repository"),
        (true, false) => Problem::unsupported("ADD from a URL")
            .hint("fetch it in a RUN step, or put it into the context"),
        (false, true) => Problem::new("source can't be a git ref for COPY"),
        (false, false) => Problem::new("source can't be a URL for COPY"),
    })
}

/// Reads `--chmod`: an octal number, or symbolic as `chmod` takes it.
fn parse_mode(text: &str) -> Result<(Option<u32>, String)> {
    if text.is_empty() {
        return Ok((None, String::new()));
    }
    let numeric = || {
        Problem::new(format!(
            "invalid chmod parameter: '{text}'. it should be octal string and between 0 and 07777"
        ))
    };
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return match u32::from_str_radix(text, 8) {
            Ok(mode) if mode <= 0o7777 => Ok((Some(mode), String::new())),
            _ => Err(numeric()),
        };
    }
    if text.split(',').all(is_symbolic) {
        return Ok((None, text.into()));
    }
    Err(if text.starts_with(|c: char| c.is_ascii_digit()) {
        numeric()
    } else {
        Problem::new(format!(
            "invalid chmod parameter: '{text}' is neither octal nor symbolic, such as u=rw,go=r"
        ))
    })
}

/// `[ugoa]*([-+=][rwxXst]*|[-+=][ugo])+`
fn is_symbolic(clause: &str) -> bool {
    let mut rest = clause.trim_start_matches(['u', 'g', 'o', 'a']);
    if rest.is_empty() {
        return false;
    }
    while !rest.is_empty() {
        let Some(operation) = rest.strip_prefix(['-', '+', '=']) else { return false };
        rest = match operation.strip_prefix(['u', 'g', 'o']) {
            Some(rest) => rest,
            None => operation.trim_start_matches(['r', 'w', 'x', 'X', 's', 't']),
        };
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes() {
        let octal = |mode| Ok((Some(mode), String::new()));
        assert_eq!(parse_mode("0644"), octal(0o644));
        assert_eq!(parse_mode("7777"), octal(0o7777));
        for symbolic in ["u=rw,go=r", "+x", "a+X", "u+s,g-w", "g=u", "=", "u+x-w"] {
            assert_eq!(parse_mode(symbolic), Ok((None, symbolic.into())), "{symbolic}");
        }
        for bad in ["10000", "8", "64a", "x", "u", "u=q", ",", "u=r,"] {
            assert!(
                parse_mode(bad).unwrap_err().message.starts_with("invalid chmod parameter"),
                "{bad}"
            );
        }
    }
}
