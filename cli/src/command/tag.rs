//! `slipway tag`.

use slipway_spec::ImageReference;

use crate::args::image::TagArgs;
use crate::failure::Failure;

/// Returns the new name.
///
/// # Errors
/// When the name has a digest: names are given to images, digests are not.
pub(crate) fn target(args: &TagArgs) -> Result<&ImageReference, Failure> {
    if args.target.digest().is_some() {
        return Err(Failure::new(format!(
            "cannot give the name {}: it has a digest",
            args.target.familiar()
        ))
        .hint("use NAME[:TAG]"));
    }
    Ok(&args.target)
}

#[cfg(test)]
mod tests {
    use slipway_spec::Digest;

    use super::*;
    use crate::args::Command;
    use crate::command::testing;

    #[test]
    fn a_digest_is_no_name_to_give() {
        for (name, good) in [("b:1".to_owned(), true), (format!("b@{}", Digest::of(b"x")), false)] {
            let Command::Tag(args) = testing::command(&["tag", "a", &name]) else {
                panic!("not tag")
            };
            assert_eq!(target(&args).is_ok(), good, "{name}");
        }
    }
}
