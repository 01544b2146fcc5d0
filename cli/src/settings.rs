//! What flags and the environment say about the whole program. Nothing else reads the environment.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use slipway_spec::Platform;

use crate::args::GlobalArgs;
use crate::args::build::ProgressMode;
use crate::args::value::platform_list;
use crate::failure::Failure;

/// The environment as it was when the program started.
#[derive(Clone, Debug, Default)]
pub(crate) struct Environment(HashMap<OsString, OsString>);

impl Environment {
    /// Reads the process's environment.
    pub(crate) fn of_process() -> Self {
        Self(std::env::vars_os().collect())
    }

    /// Makes an environment of these variables alone.
    #[cfg(test)]
    pub(crate) fn of(variables: &[(&str, &str)]) -> Self {
        Self(variables.iter().map(|(name, value)| (name.into(), value.into())).collect())
    }

    /// Returns a variable, which may be empty.
    pub(crate) fn get(&self, name: &str) -> Option<&OsStr> {
        self.0.get(OsStr::new(name)).map(OsString::as_os_str)
    }

    /// Returns a variable if it is text.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.get(name)?.to_str()
    }

    /// Returns a variable that counts as unset when it is empty.
    fn non_empty(&self, name: &str) -> Option<&OsStr> {
        self.get(name).filter(|value| !value.is_empty())
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.non_empty(name).map(PathBuf::from)
    }
}

/// Resolved settings.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// The folder of the store.
    pub(crate) root: PathBuf,
    /// The folder of docker's `config.json`; `None` if there is no home folder.
    pub(crate) docker_config_dir: Option<PathBuf>,
    /// The folder of certificates by registry host.
    pub(crate) certs_dir: PathBuf,
    /// `DOCKER_DEFAULT_PLATFORM`: what commands use that have no `--platform`.
    pub(crate) default_platforms: Vec<Platform>,
    /// `BUILDKIT_PROGRESS`: what `--progress=auto` means.
    pub(crate) default_progress: Option<ProgressMode>,
    /// Whether colours may be used.
    pub(crate) color: bool,
    /// Rows of live output under each running step.
    pub(crate) log_rows: usize,
    /// Whether to show what happens inside.
    pub(crate) debug: bool,
}

/// Rows of live output under a running step; more can be asked for, fewer cannot.
const MIN_LOG_ROWS: usize = 6;

impl Settings {
    /// Resolves settings from flags and environment. `is_root` says whether the process may write system folders.
    ///
    /// # Errors
    /// When there is no folder for the store, or a variable has a value that makes no sense.
    pub(crate) fn resolve(
        global: &GlobalArgs,
        environment: &Environment,
        is_root: bool,
    ) -> Result<Self, Failure> {
        let home = environment.path("HOME");
        let default_platforms = match environment.text("DOCKER_DEFAULT_PLATFORM") {
            Some(text) => {
                platform_list(text)
                    .map_err(|error| {
                        Failure::new(format!("cannot use DOCKER_DEFAULT_PLATFORM: {error}"))
                    })?
                    .0
            }
            None => vec![],
        };
        let default_progress =
            match environment.text("BUILDKIT_PROGRESS").filter(|text| !text.is_empty()) {
                Some(text) => Some(ProgressMode::from_str(text, false).map_err(|_| {
                    Failure::new(format!(
                        "cannot use BUILDKIT_PROGRESS: {text:?} is not a way to show progress"
                    ))
                    .hint("use auto, plain, tty, quiet, rawjson or none")
                })?),
                None => None,
            };
        let log_rows =
            environment.text("BUILDKIT_TTY_LOG_LINES").and_then(|text| text.parse().ok());
        Ok(Self {
            root: root(global.root.as_deref(), environment, home.as_deref(), is_root)?,
            docker_config_dir: environment
                .path("DOCKER_CONFIG")
                .or_else(|| Some(home?.join(".docker"))),
            certs_dir: environment
                .path("SLIPWAY_CERTS_DIR")
                .unwrap_or_else(|| "/etc/docker/certs.d".into()),
            default_platforms,
            default_progress,
            color: environment.get("NO_COLOR").is_none(),
            log_rows: log_rows.unwrap_or(MIN_LOG_ROWS).max(MIN_LOG_ROWS),
            debug: global.debug,
        })
    }

    /// Returns the way to show progress that is meant by `mode`; never [`ProgressMode::Auto`].
    pub(crate) fn progress(&self, mode: ProgressMode, stderr_is_terminal: bool) -> ProgressMode {
        let mode = match (mode, self.default_progress) {
            (ProgressMode::Auto, Some(default)) => default,
            (mode, _) => mode,
        };
        match mode {
            // Lines of the inner log would tear a display that is redrawn in place.
            ProgressMode::Auto if stderr_is_terminal && !self.debug => ProgressMode::Tty,
            ProgressMode::Auto => ProgressMode::Plain,
            other => other,
        }
    }

    /// Returns the platforms asked for by flags, or else the default ones; empty means the host's.
    pub(crate) fn platforms(&self, asked: Vec<Platform>) -> Vec<Platform> {
        if asked.is_empty() { self.default_platforms.clone() } else { asked }
    }
}

fn root(
    flag: Option<&Path>,
    environment: &Environment,
    home: Option<&Path>,
    is_root: bool,
) -> Result<PathBuf, Failure> {
    // XDG's base directory specification: a path that is not absolute is to be ignored.
    let data_home = environment.path("XDG_DATA_HOME").filter(|path| path.is_absolute());
    let chosen = match flag {
        Some(flag) if flag.as_os_str().is_empty() => return Err(Failure::new("--root is empty")),
        Some(flag) => Some(flag.to_path_buf()),
        None => environment.path("SLIPWAY_ROOT"),
    };
    chosen
        .or_else(|| is_root.then(|| "/var/lib/slipway".into()))
        .or_else(|| data_home.map(|dir| dir.join("slipway")))
        .or_else(|| home.map(|home| home.join(".local/share/slipway")))
        .ok_or_else(|| {
            Failure::new("cannot tell where to keep images: HOME is not set")
                .hint("say where with --root DIR or SLIPWAY_ROOT")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(
        flag: Option<&str>,
        variables: &[(&str, &str)],
        is_root: bool,
    ) -> Result<Settings, Failure> {
        let global = GlobalArgs { root: flag.map(Into::into), debug: false };
        Settings::resolve(&global, &Environment::of(variables), is_root)
    }

    #[test]
    fn the_root_folder_is_the_first_that_is_named() {
        for (flag, variables, is_root, expected) in [
            (Some("/flag"), &[("SLIPWAY_ROOT", "/env")][..], true, "/flag"),
            (None, &[("SLIPWAY_ROOT", "/env")], true, "/env"),
            (None, &[("SLIPWAY_ROOT", ""), ("HOME", "/h")], true, "/var/lib/slipway"),
            (None, &[("HOME", "/h"), ("XDG_DATA_HOME", "/x")], true, "/var/lib/slipway"),
            (None, &[("HOME", "/h"), ("XDG_DATA_HOME", "/x")], false, "/x/slipway"),
            (None, &[("HOME", "/h"), ("XDG_DATA_HOME", "rel")], false, "/h/.local/share/slipway"),
            (None, &[("HOME", "/h")], false, "/h/.local/share/slipway"),
        ] {
            assert_eq!(
                settings(flag, variables, is_root).unwrap().root,
                Path::new(expected),
                "{variables:?}"
            );
        }
        assert!(settings(None, &[], false).is_err());
        assert!(settings(Some(""), &[], true).is_err());
    }

    #[test]
    fn variables_of_docker_and_buildkit_count() {
        let settings_of = |variables| settings(Some("/r"), variables, false);
        let plain = settings_of(&[]).unwrap();
        assert_eq!((plain.color, plain.log_rows, plain.docker_config_dir), (true, 6, None));
        assert_eq!(plain.certs_dir, Path::new("/etc/docker/certs.d"));
        let set = settings_of(&[
            ("NO_COLOR", ""),
            ("BUILDKIT_TTY_LOG_LINES", "9"),
            ("DOCKER_CONFIG", "/d"),
            ("SLIPWAY_CERTS_DIR", "/c"),
            ("DOCKER_DEFAULT_PLATFORM", "linux/arm64"),
        ])
        .unwrap();
        assert_eq!((set.color, set.log_rows), (false, 9));
        assert_eq!(
            (set.docker_config_dir.as_deref(), set.certs_dir.as_path()),
            (Some(Path::new("/d")), Path::new("/c"))
        );
        assert_eq!(set.platforms(vec![])[0].to_string(), "linux/arm64");
        assert_eq!(
            set.platforms(vec!["linux/arm".parse().unwrap()])[0].to_string(),
            "linux/arm/v7"
        );
        assert_eq!(
            settings_of(&[("HOME", "/h")]).unwrap().docker_config_dir.unwrap(),
            Path::new("/h/.docker")
        );
        assert!(settings_of(&[("DOCKER_DEFAULT_PLATFORM", "x/y/z/w")]).is_err());
        assert!(settings_of(&[("BUILDKIT_PROGRESS", "fancy")]).is_err());
        assert_eq!(settings_of(&[("BUILDKIT_TTY_LOG_LINES", "2")]).unwrap().log_rows, 6);
    }

    #[test]
    fn automatic_progress_depends_on_the_terminal_and_the_environment() {
        use ProgressMode::*;
        for (variables, mode, terminal, expected) in [
            (&[][..], Auto, true, Tty),
            (&[], Auto, false, Plain),
            (&[], Tty, false, Tty),
            (&[("BUILDKIT_PROGRESS", "rawjson")], Auto, true, RawJson),
            (&[("BUILDKIT_PROGRESS", "plain")], Tty, true, Tty),
            (&[("BUILDKIT_PROGRESS", "auto")], Auto, true, Tty),
            (&[("BUILDKIT_PROGRESS", "")], Auto, false, Plain),
        ] {
            let settings = settings(Some("/r"), variables, false).unwrap();
            assert_eq!(settings.progress(mode, terminal), expected, "{variables:?} {mode:?}");
        }
    }
}
