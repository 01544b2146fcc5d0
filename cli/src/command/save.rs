//! `slipway save`.

use std::path::PathBuf;

use super::Context;
use crate::args::image::SaveArgs;
use crate::failure::Failure;
use crate::output::Dest;

/// Returns where the archive goes.
///
/// # Errors
/// When that would be a terminal.
pub(crate) fn destination(args: &SaveArgs, context: &Context) -> Result<Dest, Failure> {
    match &args.output {
        Some(path) if path.as_os_str() != "-" => Ok(Dest::Path(PathBuf::from(path))),
        _ if context.printer.terminals.stdout => Err(Failure::new(
            "refusing to write an archive to the terminal: use -o FILE or redirect standard output",
        )),
        _ => Ok(Dest::Stdout),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;
    use crate::command::testing;

    #[test]
    fn archives_do_not_go_to_terminals() {
        for (words, terminal, expected) in [
            (&["save", "a"][..], false, Some(Dest::Stdout)),
            (&["save", "a"], true, None),
            (&["save", "-o", "-", "a"], true, None),
            (&["save", "-o", "f", "a"], true, Some(Dest::Path("f".into()))),
        ] {
            let (mut context, ..) = testing::context(&[]);
            context.printer.terminals.stdout = terminal;
            let Command::Save(args) = testing::command(words) else { panic!("not save") };
            assert_eq!(destination(&args, &context).ok(), expected, "{words:?}");
        }
    }
}
