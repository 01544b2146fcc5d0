//! "Did you mean …?"

/// Returns the option that is at most two edits away, unless the word is an option itself.
pub(crate) fn suggest<'a>(
    word: &str,
    options: impl IntoIterator<Item = &'a str>,
    case_sensitive: bool,
) -> Option<String> {
    // Far longer words cannot be typing errors, and comparing them would cost time.
    if word.len() > 100 {
        return None;
    }
    let fold = |text: &str| if case_sensitive { text.to_owned() } else { text.to_lowercase() };
    let wanted = fold(word);
    let mut best: Option<(usize, &str)> = None;
    for option in options {
        let distance = distance(&wanted, &fold(option));
        if distance == 0 {
            return None;
        }
        if distance < 3 && best.is_none_or(|(known, _)| distance < known) {
            best = Some((distance, option));
        }
    }
    let (_, option) = best?;
    if case_sensitive {
        return Some(option.into());
    }
    // The answer is cased as the question was.
    Some(match word {
        word if *word == word.to_lowercase() => option.to_lowercase(),
        word if *word == word.to_uppercase() => option.to_uppercase(),
        _ => option.into(),
    })
}

/// Appends the suggestion, if there is one, to a message.
pub(crate) fn with_suggestion(message: String, suggestion: Option<String>) -> String {
    match suggestion {
        Some(word) => format!("{message} (did you mean {word}?)"),
        None => message,
    }
}

/// The number of characters to insert, delete or replace.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words_are_suggested() {
        let options = ["RUN", "COPY", "ENV", "USER"];
        let ask = |word| suggest(word, options, false);
        assert_eq!(ask("RUNN").as_deref(), Some("RUN"));
        assert_eq!(ask("copi").as_deref(), Some("copy"));
        assert_eq!(ask("COYP").as_deref(), Some("COPY"));
        assert_eq!(ask("run"), None);
        assert_eq!(ask("nonsense"), None);
        assert_eq!(suggest("Mount", ["mount"], true).as_deref(), Some("mount"));
        assert_eq!(ask(&"x".repeat(1000)), None);
    }
}
