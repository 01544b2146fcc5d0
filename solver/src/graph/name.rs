//! What a vertex is called where its definition says nothing: by what it does, in the words that BuildKit's clients show.

use slipway_spec::llb::pb;

/// Names are made of other names, and a graph can name itself twice at every step; longer ones are cut, in bytes.
const MAX_NAME: usize = 2000;

/// Returns the name of an operation. `input` names its inputs.
pub(super) fn describe(op: &pb::Op, input: impl Fn(usize) -> String) -> String {
    let side = |index: Option<i64>| match usize::try_from(index.unwrap_or(-1)) {
        Ok(index) => format!("({})", input(index)),
        Err(_) => "scratch".into(),
    };
    match &op.op {
        Some(pb::op::Op::Source(source)) => source.identifier.clone(),
        Some(pb::op::Op::Exec(exec)) => {
            exec.meta.as_ref().map(|meta| meta.args.join(" ")).unwrap_or_default()
        }
        Some(pb::op::Op::File(file)) => {
            let actions = file.actions.iter().filter_map(|action| action.action.as_ref());
            actions.map(describe_action).collect::<Vec<_>>().join(", ")
        }
        Some(pb::op::Op::Build(_)) => "build".into(),
        Some(pb::op::Op::Merge(_)) => {
            let names: Vec<String> = (0..op.inputs.len()).map(input).collect();
            cut(format!("merge ({})", names.join(", ")))
        }
        Some(pb::op::Op::Diff(diff)) => {
            let lower = side(diff.lower.as_ref().map(|side| side.input));
            let upper = side(diff.upper.as_ref().map(|side| side.input));
            cut(format!("diff {lower} -> {upper}"))
        }
        Some(pb::op::Op::Passthrough(passthrough)) => format!("passthrough {}", passthrough.id),
        None => String::new(),
    }
}

fn describe_action(action: &pb::file_action::Action) -> String {
    use pb::file_action::Action;
    match action {
        Action::Copy(copy) => format!("copy {} {}", copy.src, copy.dest),
        Action::Mkfile(file) => format!("mkfile {}", file.path),
        Action::Mkdir(folder) => format!("mkdir {}", folder.path),
        Action::Rm(remove) => format!("rm {}", remove.path),
        Action::Symlink(link) => format!("symlink {} -> {}", link.newpath, link.oldpath),
    }
}

fn cut(mut name: String) -> String {
    if name.len() > MAX_NAME {
        name.truncate(name.floor_char_boundary(MAX_NAME));
        name.push('…');
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use pb::file_action::Action;

    fn name(op: pb::op::Op, inputs: usize) -> String {
        let inputs = vec![pb::Input::default(); inputs];
        let op = pb::Op { op: Some(op), inputs, ..Default::default() };
        describe(&op, |at| format!("input {at}"))
    }

    #[test]
    fn operations_are_named_by_what_they_do() {
        let actions = [
            Action::Mkdir(pb::FileActionMkDir { path: "/d".into(), ..Default::default() }),
            Action::Mkfile(pb::FileActionMkFile { path: "/f".into(), ..Default::default() }),
            Action::Rm(pb::FileActionRm { path: "/r".into(), ..Default::default() }),
            Action::Copy(pb::FileActionCopy {
                src: "/a".into(),
                dest: "/b".into(),
                ..Default::default()
            }),
            Action::Symlink(pb::FileActionSymlink {
                oldpath: "/old".into(),
                newpath: "/new".into(),
                ..Default::default()
            }),
        ];
        let actions = actions
            .map(|action| pb::FileAction { action: Some(action), ..Default::default() })
            .to_vec();
        assert_eq!(
            name(pb::op::Op::File(pb::FileOp { actions }), 1),
            "mkdir /d, mkfile /f, rm /r, copy /a /b, symlink /new -> /old"
        );
        assert_eq!(name(pb::op::Op::Merge(pb::MergeOp::default()), 2), "merge (input 0, input 1)");
        let diff = pb::DiffOp {
            lower: Some(pb::LowerDiffInput { input: -1 }),
            upper: Some(pb::UpperDiffInput { input: 0 }),
        };
        assert_eq!(name(pb::op::Op::Diff(diff), 1), "diff scratch -> (input 0)");
        let passthrough = pb::PassthroughOp { id: "x".into(), ..Default::default() };
        assert_eq!(name(pb::op::Op::Passthrough(passthrough), 1), "passthrough x");
    }

    #[test]
    fn names_do_not_grow_with_the_graph() {
        let merge = pb::Op {
            op: Some(pb::op::Op::Merge(pb::MergeOp::default())),
            inputs: vec![pb::Input::default(); 2],
            ..Default::default()
        };
        let mut last = "ü".to_owned();
        for _ in 0..62 {
            last = describe(&merge, |_| last.clone());
        }
        assert!(last.ends_with('…') && last.len() <= MAX_NAME + '…'.len_utf8());
    }
}
