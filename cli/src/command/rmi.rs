//! `slipway rmi`.

use slipway_spec::{Digest, ImageReference};

use super::Context;

/// What the removal of an image did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// A name was taken away.
    Untagged(ImageReference),
    /// The image itself went, as nothing names it any more.
    Deleted(Digest),
}

/// Tells what was removed.
pub(crate) fn report(removals: &[Removal], context: &Context) {
    for removal in removals {
        context.printer.line(&match removal {
            Removal::Untagged(name) => format!("Untagged: {}", name.familiar()),
            Removal::Deleted(digest) => format!("Deleted: {digest}"),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::testing;

    #[test]
    fn reports_as_docker() {
        let (context, stdout, _) = testing::context(&[]);
        let digest = Digest::of(b"x");
        report(
            &[Removal::Untagged("a".parse().unwrap()), Removal::Deleted(digest.clone())],
            &context,
        );
        assert_eq!(stdout.take(), format!("Untagged: a:latest\nDeleted: {digest}\n"));
    }
}
