//! What a caller may give to a target: build arguments, secrets, SSH agents.

use std::collections::{BTreeMap, BTreeSet};

use slipway_spec::llb::Lines;

use super::stage::Plan;

/// An argument where it is declared.
#[derive(Clone, Debug)]
pub(crate) struct ArgInfo {
    /// What it is unless the caller says otherwise; may be empty.
    pub(crate) value: String,
    /// From the comments above; may be empty.
    pub(crate) description: String,
    /// Arguments that the default is made of.
    pub(crate) needs: BTreeSet<String>,
    pub(crate) lines: Lines,
}

impl ArgInfo {
    /// Makes an argument about which no more is known yet.
    pub(crate) fn at(lines: Lines) -> Self {
        Self { value: String::new(), description: String::new(), needs: BTreeSet::new(), lines }
    }

    /// Tells what the default is made of. An argument that is made of itself is made of what it was made of before.
    pub(crate) fn set_needs(&mut self, key: &str, needs: BTreeSet<String>, before: Option<&Self>) {
        self.needs = needs;
        if self.needs.remove(key) {
            self.needs.extend(before.into_iter().flat_map(|before| before.needs.iter().cloned()));
        }
    }
}

/// A secret or an SSH agent.
#[derive(Clone, Debug)]
struct Grant {
    required: bool,
    lines: Lines,
}

/// What the instructions of a stage use.
#[derive(Clone, Debug, Default)]
pub(crate) struct StageUses {
    declared: BTreeMap<String, ArgInfo>,
    pub(crate) used: BTreeSet<String>,
    secrets: BTreeMap<String, Grant>,
    ssh: BTreeMap<String, Grant>,
}

impl StageUses {
    /// Notes an argument; the last declaration of a name counts.
    pub(crate) fn declare(&mut self, key: &str, info: ArgInfo) {
        self.declared.insert(key.into(), info);
    }

    /// Notes a secret that a step reads; the first one of a name counts.
    pub(crate) fn secret(&mut self, id: &str, required: bool, lines: Lines) {
        self.secrets.entry(id.into()).or_insert(Grant { required, lines });
    }

    /// Notes an SSH agent that a step talks to; the first one of a name counts.
    pub(crate) fn ssh(&mut self, id: &str, required: bool, lines: Lines) {
        self.ssh.entry(id.into()).or_insert(Grant { required, lines });
    }
}

/// Returns what a comment says about a name: `# name description`.
pub(crate) fn doc_comment(comments: &[String], name: &str) -> String {
    let description =
        |comment: &'_ String| Some(comment.strip_prefix(name)?.strip_prefix(' ')?.to_owned());
    if name.is_empty() {
        return String::new();
    }
    comments.iter().find_map(description).unwrap_or_default()
}

/// An argument that a target uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OutlineArg {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) value: String,
    pub(crate) lines: Lines,
}

/// A secret or an SSH agent that a target uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OutlineGrant {
    pub(crate) name: String,
    pub(crate) required: bool,
    pub(crate) lines: Lines,
}

/// All that a target and the stages below it use, in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outline {
    pub(crate) args: Vec<OutlineArg>,
    pub(crate) secrets: Vec<OutlineGrant>,
    pub(crate) ssh: Vec<OutlineGrant>,
}

impl Outline {
    /// Gathers what was noted while the plan was lowered.
    pub(crate) fn new(plan: &Plan<'_>, uses: &[StageUses]) -> Self {
        let mut outline = Self::default();
        // Depth first: the base of a stage before what it copies from. What is found first counts.
        let mut stack = vec![plan.target];
        let mut seen = BTreeSet::new();
        while let Some(index) = stack.pop() {
            if !seen.insert(index) {
                continue;
            }
            let Some(stage_uses) = uses.get(index) else { continue };
            outline.add_args(plan, index, stage_uses);
            add_grants(&mut outline.secrets, &stage_uses.secrets);
            add_grants(&mut outline.ssh, &stage_uses.ssh);
            let needs: Vec<usize> = plan.needs(index).collect();
            stack.extend(needs.into_iter().rev());
        }
        outline.args.sort_by_key(|arg| arg.lines.first);
        outline.secrets.sort_by_key(|grant| grant.lines.first);
        outline.ssh.sort_by_key(|grant| grant.lines.first);
        outline
    }

    fn add_args(&mut self, plan: &Plan<'_>, index: usize, uses: &StageUses) {
        let find = |name: &str| uses.declared.get(name).or_else(|| plan.global_args.get(name));
        let mut used: BTreeSet<&str> = BTreeSet::new();
        let stage = plan.stages.get(index);
        let mut stack: Vec<&str> = stage
            .into_iter()
            .flat_map(|stage| &stage.used_args)
            .chain(&uses.used)
            .map(String::as_str)
            .collect();
        while let Some(name) = stack.pop() {
            if used.insert(name) {
                stack.extend(find(name).into_iter().flat_map(|i| &i.needs).map(String::as_str));
            }
        }
        for name in used {
            let Some(info) = find(name) else { continue };
            if self.args.iter().all(|arg| arg.name != name) {
                self.args.push(OutlineArg {
                    name: name.into(),
                    description: info.description.clone(),
                    value: info.value.clone(),
                    lines: info.lines,
                });
            }
        }
    }
}

fn add_grants(list: &mut Vec<OutlineGrant>, grants: &BTreeMap<String, Grant>) {
    for (name, Grant { required, lines }) in grants {
        if list.iter().all(|grant| grant.name != *name) {
            list.push(OutlineGrant { name: name.clone(), required: *required, lines: *lines });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_describe_what_they_name() {
        let comments = ["NAME is one", "OTHER  two", "NAME is three", "NAMES four"];
        let comments: Vec<String> = comments.iter().map(|c| (*c).to_owned()).collect();
        for (name, expected) in [("NAME", "is one"), ("OTHER", " two"), ("NAM", ""), ("", "")] {
            assert_eq!(doc_comment(&comments, name), expected, "{name}");
        }
    }
}
