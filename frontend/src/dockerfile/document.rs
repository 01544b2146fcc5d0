//! A whole file, typed: what stands before the first `FROM`, and the stages.

use slipway_spec::llb::Lines;

use super::ast::Ast;
use super::instruction::{Command, From, Instruction, type_node};
use super::lint::Linter;
use super::problem::Problem;

/// A checked file: what stands before the first `FROM`, and what follows.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    pub(crate) escape: char,
    pub(crate) globals: Vec<Command>,
    pub(crate) stages: Vec<ParsedStage>,
}

/// A `FROM` and the instructions below it.
#[derive(Clone, Debug)]
pub(crate) struct ParsedStage {
    pub(crate) from: From,
    /// `FROM` as written.
    pub(crate) keyword: String,
    pub(crate) code: String,
    /// Comments above.
    pub(crate) comments: Vec<String>,
    pub(crate) lines: Lines,
    pub(crate) commands: Vec<Command>,
}

impl Document {
    /// Types every instruction, of unused stages too, and returns everything that is wrong.
    pub(crate) fn new(ast: &Ast, lint: &Linter) -> Result<Self, Vec<Problem>> {
        let mut document = Self { escape: ast.escape, globals: vec![], stages: vec![] };
        let mut problems = vec![];
        // After an instruction that could not be read, what stands before a stage cannot be judged.
        let mut judge_order = true;
        lint.empty_continuations(&ast.empty_continuations);
        for node in &ast.nodes {
            // What stands below a mistake is not looked at.
            let silent = Linter::silent();
            let lint = if problems.is_empty() { lint } else { &silent };
            lint.node(node);
            let command = match type_node(node) {
                Ok(command) => command,
                Err(problem) => {
                    problems.push(problem);
                    judge_order = false;
                    continue;
                }
            };
            lint.description(&command);
            match (&command.instruction, document.stages.last_mut()) {
                (Instruction::From(from), _) => document.stages.push(ParsedStage {
                    from: from.clone(),
                    keyword: command.keyword.clone(),
                    code: command.code.clone(),
                    comments: command.comments.clone(),
                    lines: command.lines,
                    commands: vec![],
                }),
                (_, Some(stage)) => stage.commands.push(command),
                (Instruction::Arg(_), None) => document.globals.push(command),
                (_, None) if judge_order => {
                    let problem =
                        Problem::new("no build stage in current context").at(command.lines);
                    problems.push(problem.hint(format!("{} must come after FROM", command.name)));
                    judge_order = false;
                }
                (_, None) => {}
            }
        }
        if problems.is_empty() && document.stages.is_empty() {
            problems.push(Problem::new("dockerfile contains no stages to build"));
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        lint.document(&document);
        Ok(document)
    }
}
