//! Modes as `chmod` takes them: `u=rw,go=r`, `a+X`, `g=u` (POSIX, utility `chmod`), with no mask.

/// How a copy sets modes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// As they are in the source.
    Keep,
    /// The same for everything.
    Fixed(u32),
    /// Changed in these steps, one after another.
    Symbolic(Vec<Step>),
}

/// One change: the bits of these classes of users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    who: u32,
    operator: u8,
    permissions: Vec<u8>,
}

const USER: u32 = 0o4700;
const GROUP: u32 = 0o2070;
const OTHER: u32 = 0o1007;

/// Reads a symbolic mode; `None` when it is not one.
pub(crate) fn parse(text: &str) -> Option<Mode> {
    let mut steps = vec![];
    for clause in text.split(',') {
        let end = clause.bytes().position(|b| !b"ugoa".contains(&b))?;
        let (classes, mut rest) = clause.as_bytes().split_at(end);
        let who = classes.iter().fold(0, |who, class| who | bits_of(*class));
        let who = if who == 0 { USER | GROUP | OTHER } else { who };
        while let Some((operator, after)) = rest.split_first() {
            if !b"+-=".contains(operator) {
                return None;
            }
            let end = after.iter().position(|b| b"+-=".contains(b)).unwrap_or(after.len());
            let (permissions, next) = after.split_at(end);
            if !permissions.iter().all(|b| b"rwxXstugo".contains(b)) {
                return None;
            }
            steps.push(Step { who, operator: *operator, permissions: permissions.to_vec() });
            rest = next;
        }
    }
    (!steps.is_empty()).then_some(Mode::Symbolic(steps))
}

fn bits_of(class: u8) -> u32 {
    match class {
        b'u' => USER,
        b'g' => GROUP,
        b'o' => OTHER,
        _ => USER | GROUP | OTHER,
    }
}

impl Mode {
    /// Returns the mode that an entry of this mode gets.
    pub(crate) fn apply(&self, before: u32, directory: bool) -> u32 {
        match self {
            Self::Keep => before,
            Self::Fixed(mode) => *mode,
            Self::Symbolic(steps) => {
                steps.iter().fold(before, |mode, step| step.apply(mode, directory))
            }
        }
    }
}

impl Step {
    fn apply(&self, mode: u32, directory: bool) -> u32 {
        let spread = |bits: u32| bits << 6 | bits << 3 | bits;
        let wanted = self.permissions.iter().fold(0, |wanted, permission| {
            wanted
                | match permission {
                    b'r' => spread(4),
                    b'w' => spread(2),
                    b'x' => spread(1),
                    b'X' if directory || mode & 0o111 != 0 => spread(1),
                    b's' => 0o6000,
                    b't' => 0o1000,
                    b'u' => spread(mode >> 6 & 7),
                    b'g' => spread(mode >> 3 & 7),
                    b'o' => spread(mode & 7),
                    _ => 0,
                }
        }) & self.who;
        match self.operator {
            b'+' => mode | wanted,
            b'-' => mode & !wanted,
            _ => mode & !self.who | wanted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_modes_as_chmod_does() {
        for (text, before, directory, expected) in [
            ("u=rwX,go=rX", 0o600, false, 0o644),
            ("u=rwX,go=rX", 0o700, false, 0o755),
            ("u=rwX,go=rX", 0o600, true, 0o755),
            ("a+x", 0o644, false, 0o755),
            ("+x", 0o644, false, 0o755),
            ("go-rwx", 0o777, false, 0o700),
            ("g=u,o=", 0o751, false, 0o770),
            ("u+s,g+s,+t", 0o755, false, 0o7755),
            ("u-s", 0o4755, false, 0o755),
            ("u=r+w-r", 0o777, false, 0o277),
            ("=", 0o777, false, 0),
        ] {
            assert_eq!(
                parse(text).unwrap().apply(before, directory),
                expected,
                "{text} {before:o}"
            );
        }
        for bad in ["", "u", "z+x", "u=q", "u*r", "755"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
