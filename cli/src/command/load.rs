//! `slipway load`.

use std::path::PathBuf;

use slipway_spec::{Digest, ImageReference};

use super::Context;
use crate::args::image::LoadArgs;
use crate::failure::Failure;

/// Where an archive comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LoadSource {
    /// A file.
    Path(PathBuf),
    /// Standard input.
    Stdin,
}

/// Returns where the archive comes from.
///
/// # Errors
/// When that would be a terminal.
pub(crate) fn source(args: &LoadArgs, context: &Context) -> Result<LoadSource, Failure> {
    match &args.input {
        Some(path) if path.as_os_str() != "-" => Ok(LoadSource::Path(path.clone())),
        _ if context.printer.terminals.stdin => Err(Failure::new(
            "refusing to read an archive from the terminal: use -i FILE or redirect standard input",
        )),
        _ => Ok(LoadSource::Stdin),
    }
}

/// Tells which image the archive held: its name, or its digest if it has none.
pub(crate) fn report(name: Option<&ImageReference>, digest: &Digest, context: &Context) {
    context.printer.line(&match name {
        Some(name) => format!("Loaded image: {}", name.familiar()),
        None => format!("Loaded image ID: {digest}"),
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;
    use crate::command::testing;

    #[test]
    fn archives_do_not_come_from_terminals() {
        for (words, terminal, expected) in [
            (&["load"][..], false, Some(LoadSource::Stdin)),
            (&["load"], true, None),
            (&["load", "-i", "-"], true, None),
            (&["load", "-i", "f"], true, Some(LoadSource::Path("f".into()))),
        ] {
            let (mut context, ..) = testing::context(&[]);
            context.printer.terminals.stdin = terminal;
            let Command::Load(args) = testing::command(words) else { panic!("not load") };
            assert_eq!(source(&args, &context).ok(), expected, "{words:?}");
        }
    }

    #[test]
    fn reports_as_docker() {
        let (context, stdout, _) = testing::context(&[]);
        let digest = Digest::of(b"x");
        report(Some(&"a:1".parse().unwrap()), &digest, &context);
        report(None, &digest, &context);
        assert_eq!(stdout.take(), format!("Loaded image: a:1\nLoaded image ID: {digest}\n"));
    }
}
