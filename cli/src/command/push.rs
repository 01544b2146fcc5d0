//! `slipway push`.

use slipway_spec::Descriptor;

use super::Context;
use crate::args::image::PushArgs;

/// Tells what the registry now has under the name.
pub(crate) fn report(args: &PushArgs, pushed: &Descriptor, context: &Context) {
    let line = if args.quiet {
        args.name.to_string()
    } else {
        let tag = args.name.tag().unwrap_or_default();
        format!("{tag}: digest: {} size: {}", pushed.digest, pushed.size)
    };
    context.printer.line(line.trim_start_matches(": "));
}

#[cfg(test)]
mod tests {
    use slipway_spec::{Digest, MediaType};

    use super::*;
    use crate::args::Command;
    use crate::command::testing;

    #[test]
    fn reports_as_docker() {
        let (context, stdout, _) = testing::context(&[]);
        let digest = Digest::of(b"x");
        for (words, expected) in [
            (&["push", "a:v1"][..], format!("v1: digest: {digest} size: 3\n")),
            (&["push", "-q", "a:v1"], "docker.io/library/a:v1\n".into()),
            (&["push", &format!("a@{digest}")], format!("digest: {digest} size: 3\n")),
        ] {
            let Command::Push(args) = testing::command(words) else { panic!("not push") };
            report(&args, &Descriptor::new(MediaType::OCI_INDEX, digest.clone(), 3), &context);
            assert_eq!(stdout.take(), expected);
        }
    }
}
