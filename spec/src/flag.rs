//! Truth as text.

/// Reads a flag as Go's `strconv.ParseBool` does, which is how BuildKit reads attributes; `None` when it is neither true nor
/// false.
pub fn parse(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}
