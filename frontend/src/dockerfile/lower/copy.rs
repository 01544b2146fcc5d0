//! `COPY` and `ADD`.

use std::collections::BTreeMap;

use slipway_spec::Digest;
use slipway_spec::llb::{Copy as CopyAction, FileActions, State, VertexOptions, pb};
use slipway_spec::pattern::{PatternMatcher, clean_path};

use super::super::ast::Heredoc;
use super::super::expand::Lexer;
use super::super::files::internal;
use super::super::git;
use super::super::instruction::Copy;
use super::super::problem::{Problem, Result};
use super::super::stage::Step;
use super::super::url::file_name;
use super::{Builder, join, name, owner, windows};

/// What an instruction has said so far about repositories and checksums; a URL may add to it.
struct Fetch {
    keep_git_dir: Option<bool>,
    checksum: String,
}

impl Builder<'_> {
    pub(super) fn copy(&mut self, copy: &Copy, step: &Step) -> Result<()> {
        let command = &step.command;
        let chown = self.expand(&copy.chown)?;
        let chmod = self.expand(&copy.chmod)?;
        let checksum = self.expand(&copy.checksum)?;
        let sources = self.expand_all(&copy.sources)?;
        let dest_text = self.expand(&copy.dest)?;
        let expand_doc = |doc: &Heredoc| {
            if doc.expand { self.expand_body(&doc.body()) } else { Ok(doc.body()) }
        };
        let bodies: Result<Vec<String>> = copy.inline.iter().map(expand_doc).collect();
        let bodies = bodies?;
        let (mode, mode_text) = parse_mode(&chmod)?;
        PatternMatcher::new(&copy.exclude)
            .map_err(|error| Problem::new(format!("--exclude: {error}")))?;
        check_checksum(&checksum, &sources)?;
        let from_stage = step.sources.first().copied();
        let from = match from_stage {
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
            dest: self.destination(&dest_text)?,
            owner: owner(&chown),
            mode,
            mode_text,
            create_dest_path: true,
            exclude_patterns: copy.exclude.clone(),
            ..CopyAction::default()
        };
        let mut history = String::from(command.name);
        if copy.parents {
            history.push_str(" --parents");
        }
        for (flag, value) in [("--chown", &chown), ("--chmod", &chmod)] {
            if !value.is_empty() {
                history.push_str(&format!(" {flag}={value}"));
            }
        }
        let lexer = Lexer::new(self.plan.escape);
        let text = name::instruction(&command.code, lexer, &self.out.env);
        let platform = self.out.platform.clone();
        let options = self.vertex(&text, command.lines, true, &platform);
        let mut fetch = Fetch { keep_git_dir: copy.keep_git_dir, checksum };
        let mut actions = FileActions::new();
        for source in &sources {
            history.push_str(&format!(" {source}"));
            let named = VertexOptions { name: options.name.clone(), ..VertexOptions::default() };
            actions = match fetch.state(source, copy.add, named)? {
                Some(fetched) => {
                    let (src, attempt_unpack) = match &fetched.file {
                        Some(name) => {
                            (clean_path(&format!("/{name}")), copy.unpack.unwrap_or(false))
                        }
                        None => ("/".into(), false),
                    };
                    actions
                        .copy(&fetched.state, CopyAction { src, attempt_unpack, ..common.clone() })
                }
                None => {
                    if from_stage.is_none() {
                        self.lint.context_source(copy.add, source, command.lines);
                    }
                    actions.copy(&from, local_copy(copy, &self.local_path(source)?, &common))
                }
            };
        }
        // Files written in the Dockerfile come after all others.
        for (doc, body) in copy.inline.iter().zip(bodies) {
            history.push_str(&format!(" <<{}", doc.name));
            let path = join("/", &doc.name);
            let file = FileActions::new().mkfile(&path, 0o644, body.into_bytes(), None, None);
            let file = State::scratch().file(file, internal("preparing inline document"));
            actions = actions.copy(&file, CopyAction { src: path, ..common.clone() });
        }
        history.push_str(&format!(" {dest_text} # buildkit"));
        // A mode would also have to be given to folders that exist below.
        self.out.state = if copy.link && chmod.is_empty() && self.plan.settings.merge {
            self.link(actions, &text, options)
        } else {
            self.out.state.file(actions, options)
        };
        self.history(history, true);
        for source in &sources {
            let url = source.starts_with("http://") || source.starts_with("https://");
            let path = match url {
                true => source.clone(),
                false => self.local_path(source)?,
            };
            let path = clean_path(&format!("/{path}"));
            match from_stage {
                Some(index) => self.used.stages[self.plan.root_of(index)].insert(path),
                None if copy.add && url => false,
                None => self.used.context.insert(path),
            };
        }
        Ok(())
    }

    /// Makes a layer of its own, which does not depend on those below.
    fn link(&mut self, actions: FileActions, text: &str, options: VertexOptions) -> State {
        // Both vertices are one step for people.
        let seed = format!("{} {:?} {:?}", options.name, options.lines, options.platform);
        let group = |weak: bool| {
            Some(pb::ProgressGroup {
                id: Digest::of(seed.as_bytes()).to_string(),
                name: options.name.clone(),
                weak,
            })
        };
        let prefix = options.name.strip_suffix(text).unwrap_or_default();
        let merge = VertexOptions {
            name: format!("{prefix}LINK {text}"),
            progress_group: group(false),
            ..options.clone()
        };
        let copy = VertexOptions { progress_group: group(true), ..options.clone() };
        let layer = State::scratch().file(actions, copy);
        State::merge(&[self.out.state.clone(), layer], merge)
    }

    /// Makes a destination absolute. A slash or `/.` at its end stays, because it says that this is a directory.
    fn destination(&self, text: &str) -> Result<String> {
        let text = if text.is_empty() || text == "." { "./" } else { text };
        let text = &self.local_path(text)?;
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
        Ok(path)
    }

    /// Returns a path as it is written here, whatever system the image is for.
    pub(super) fn local_path(&self, text: &str) -> Result<String> {
        if self.is_windows() { windows::without_drive(text) } else { Ok(text.to_owned()) }
    }

    /// Expands variables in a file's body; quotes mean nothing there, and the escape is always `\`.
    fn expand_body(&self, body: &str) -> Result<String> {
        let lexer = Lexer { ignore_quotes: true, ..Lexer::new('\\') };
        self.expand_with(lexer, body)
    }
}

/// Copies what the client or a stage has.
fn local_copy(copy: &Copy, source: &str, common: &CopyAction) -> CopyAction {
    let mut action = CopyAction {
        follow_symlink: true,
        dir_copy_contents: true,
        attempt_unpack: copy.unpack.unwrap_or(copy.add),
        allow_wildcard: true,
        allow_empty_wildcard: true,
        ..common.clone()
    };
    let mut base = source;
    if copy.parents {
        // What stands before the pivot is left out of the destination.
        let (parent, pattern) = source.split_once("/./").unwrap_or(("/", source));
        // Only what is relative is cleaned, as upstream does it.
        let pattern = if pattern.starts_with('/') {
            pattern.to_owned()
        } else {
            clean_path(&format!("/{pattern}"))
        };
        if !has_wildcards(parent) && !has_wildcards(&pattern) {
            action.required_paths = vec![clean_path(&format!("/{parent}/{pattern}"))];
        }
        action.include_patterns = vec![pattern.strip_prefix('/').unwrap_or(&pattern).to_owned()];
        base = parent;
    }
    action.src = clean_path(&format!("/{base}"));
    action
}

fn has_wildcards(path: &str) -> bool {
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match c {
            '*' | '?' | '[' => return true,
            '\\' => drop(chars.next()),
            _ => {}
        }
    }
    false
}

/// Refuses a checksum of what has none.
fn check_checksum(checksum: &str, sources: &[String]) -> Result<()> {
    if checksum.is_empty() {
        return Ok(());
    }
    let [source] = sources else {
        return Err(Problem::new("checksum can't be specified for multiple sources"));
    };
    if !git::is_http(source) && !git::is_git(source) {
        return Err(Problem::new("checksum requires HTTP(S) or Git sources"));
    }
    Ok(())
}

/// A source that is fetched.
struct Fetched {
    state: State,
    /// The name of the one file; a repository is a folder.
    file: Option<String>,
}

impl Fetch {
    /// Returns the source that a URL stands for, or `None` for a path.
    fn state(
        &mut self,
        source: &str,
        add: bool,
        options: VertexOptions,
    ) -> Result<Option<Fetched>> {
        match git::parse(source) {
            git::Found::Wrong(reason) => Err(Problem::new(reason)),
            git::Found::Git(git) if !git.like_a_path => {
                if !add {
                    return Err(
                        Problem::new("source can't be a git ref for COPY").hint("ADD can fetch it")
                    );
                }
                if let (Some(flag), Some(url)) = (self.keep_git_dir, git.keep_git_dir)
                    && flag != url
                {
                    return Err(Problem::new("inconsistent keep-git-dir configuration"));
                }
                self.keep_git_dir = git.keep_git_dir.or(self.keep_git_dir);
                if !git.checksum.is_empty() {
                    if !self.checksum.is_empty() && self.checksum != git.checksum {
                        return Err(Problem::new(format!(
                            "checksum mismatch {:?} != {:?}",
                            self.checksum, git.checksum
                        )));
                    }
                    self.checksum.clone_from(&git.checksum);
                }
                let keep = self.keep_git_dir == Some(true);
                let state = git.to_state(keep, &self.checksum, "", options);
                Ok(Some(Fetched { state, file: None }))
            }
            _ if git::is_http(source) => {
                if !add {
                    return Err(
                        Problem::new("source can't be a URL for COPY").hint("ADD can fetch it")
                    );
                }
                let state = http_source(source, &self.checksum, options)?;
                Ok(Some(Fetched { state, file: Some(file_name(source)) }))
            }
            _ => Ok(None),
        }
    }
}

/// A file that is downloaded.
pub(crate) fn http_source(url: &str, checksum: &str, options: VertexOptions) -> Result<State> {
    let mut attrs = BTreeMap::from([("http.filename".to_owned(), file_name(url))]);
    if !checksum.is_empty() {
        check_digest(checksum)?;
        attrs.insert("http.checksum".into(), checksum.to_owned());
    }
    Ok(State::http(url, attrs, options))
}

/// Refuses what cannot be the digest of a file.
fn check_digest(text: &str) -> Result<()> {
    let invalid = |what: &str| {
        let hint = "it is sha256: and 64 hexadecimal digits";
        Err(Problem::new(format!("invalid checksum {text:?}: {what}")).hint(hint))
    };
    let Some((algorithm, hex)) = text.split_once(':') else {
        return invalid("the algorithm is missing");
    };
    let digits = match algorithm {
        "sha256" => 64,
        "sha384" => 96,
        "sha512" => 128,
        _ => return invalid("the algorithm is not known"),
    };
    if hex.len() != digits || !hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    {
        return invalid("the digits are wrong");
    }
    Ok(())
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
