//! What the parser makes of a Dockerfile: one node for each instruction, its arguments taken apart but not understood.

use slipway_spec::llb::Lines;

/// A parsed file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ast {
    pub(crate) nodes: Vec<Node>,
    /// `\`, or what the `escape` directive says.
    pub(crate) escape: char,
    /// Instructions with a blank line inside; the line is the instruction's last.
    pub(crate) empty_continuations: Vec<Lines>,
}

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// The first word, as written.
    pub(crate) keyword: String,
    /// The whole instruction on one line, without bodies of here-documents.
    pub(crate) original: String,
    /// Leading words that start with `--`, quotes removed.
    pub(crate) flags: Vec<String>,
    pub(crate) args: Args,
    pub(crate) heredocs: Vec<Heredoc>,
    /// Comments above, without the `#`; an empty comment parts them from those before it.
    pub(crate) comments: Vec<String>,
    pub(crate) lines: Lines,
}

/// The arguments, in the shape the instruction wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Args {
    /// Words, or the whole rest as one word, or nothing.
    Words(Vec<String>),
    /// A JSON array of strings; `HEALTHCHECK` has its type before them.
    Json(Vec<String>),
    /// `ENV` and `LABEL`.
    Pairs(Vec<Pair>),
    /// `ONBUILD`.
    Instruction(Box<Node>),
}

/// A name with a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) key: String,
    pub(crate) value: String,
    /// Whether a blank stands between them, as in the old form.
    pub(crate) legacy: bool,
}

/// A here-document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Heredoc {
    /// The word that ends the body.
    pub(crate) name: String,
    /// Whether variables in the body are expanded, where the instruction does so.
    pub(crate) expand: bool,
    /// Whether tabs at line starts are dropped.
    pub(crate) chomp: bool,
    /// The body, as it stands in the file.
    pub(crate) content: String,
}

impl Heredoc {
    /// Returns the body as it is meant.
    pub(crate) fn body(&self) -> String {
        if self.chomp { chomp(&self.content) } else { self.content.clone() }
    }
}

/// Drops tabs, and only tabs, at line starts.
pub(crate) fn chomp(text: &str) -> String {
    text.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
}
