//! `--call`: questions about a Dockerfile.

use super::value::boolean;
use crate::output::csv_fields;

/// A question that is asked instead of a build.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Call {
    /// Its name as frontends know it; `build` is none.
    pub(crate) name: String,
    /// Whether the answer is wanted as JSON.
    pub(crate) json: bool,
    /// Whether an answer that is a complaint counts as success.
    pub(crate) ignore_status: bool,
}

impl Call {
    /// Asks what could be better.
    pub(crate) fn check() -> Self {
        Self { name: "lint".into(), ..Self::default() }
    }

    /// Returns the frontend's name for the request.
    pub(crate) fn request(&self) -> String {
        format!("frontend.{}", self.name)
    }
}

/// Parses `METHOD[,format=json][,ignorestatus=BOOL]`.
pub(crate) fn call(text: &str) -> Result<Call, String> {
    let mut call = Call::default();
    for field in csv_fields(text)? {
        match field.split_once('=') {
            Some(("format", "json")) => call.json = true,
            Some(("format", "" | "text" | "txt")) => call.json = false,
            Some(("format", other)) => return Err(format!("the format {other:?} is not json")),
            Some(("ignorestatus", value)) => {
                call.ignore_status =
                    boolean(value).map_err(|error| format!("ignorestatus: {error}"))?;
            }
            Some((key, _)) => return Err(format!("{key:?} is not format or ignorestatus")),
            None if call.name.is_empty() => call.name = field,
            None => return Err("only one method can be called".into()),
        }
    }
    match call.name.as_str() {
        // Frontends know the check by its older name.
        "check" => call.name = "lint".into(),
        "" => call.name = "build".into(),
        _ => {}
    }
    Ok(call)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read() {
        let parsed = |text| call(text).map(|call| (call.name, call.json, call.ignore_status));
        let good = |name: &str, json, ignore| Ok((name.to_owned(), json, ignore));
        assert_eq!(parsed("check"), good("lint", false, false));
        assert_eq!(parsed("outline,format=json"), good("outline", true, false));
        assert_eq!(parsed("format=json,check,ignorestatus=true"), good("lint", true, true));
        assert_eq!(parsed("subrequests.describe"), good("subrequests.describe", false, false));
        assert_eq!(parsed("format=json"), good("build", true, false));
        for bad in ["check,outline", "check,x=1", "check,ignorestatus=maybe", "targets,format=xml"]
        {
            assert!(parsed(bad).is_err(), "{bad}");
        }
        assert_eq!(Call::check(), call("check").unwrap());
        assert_eq!(Call::check().request(), "frontend.lint");
    }
}
