//! Where the result of a build goes: `-o`, `--push` and `--load`, in BuildKit's grammar.
//!
//! [`parse_output`] reads one `-o`; [`resolve_outputs`] adds what the other flags imply and checks the whole.

pub(crate) mod csv;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use slipway_spec::ImageReference;

use crate::args::annotation::Annotation;
use crate::failure::Failure;

pub(crate) use csv::fields as csv_fields;

/// A kind of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutputKind {
    /// An image in the store, pushed if `push=true`.
    Image,
    /// An image that is pushed. [`resolve_outputs`] turns it into `Image`.
    Registry,
    /// An OCI image layout.
    Oci,
    /// An archive that docker loads. Without a destination, [`resolve_outputs`] turns it into `Image`.
    Docker,
    /// The files, in a folder.
    Local,
    /// The files, in a tar.
    Tar,
    /// Nothing.
    CacheOnly,
}

impl OutputKind {
    const ALL: [Self; 7] = [
        Self::Image,
        Self::Registry,
        Self::Oci,
        Self::Docker,
        Self::Local,
        Self::Tar,
        Self::CacheOnly,
    ];

    /// Returns the word behind `type=`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Registry => "registry",
            Self::Oci => "oci",
            Self::Docker => "docker",
            Self::Local => "local",
            Self::Tar => "tar",
            Self::CacheOnly => "cacheonly",
        }
    }

    /// Whether the output is an image, which has names, a digest and an id.
    pub(crate) fn is_image(self) -> bool {
        matches!(self, Self::Image | Self::Registry | Self::Oci | Self::Docker)
    }
}

/// Where the bytes of an output go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Dest {
    /// A file, or a folder where [`OutputSpec::is_folder`] says so.
    Path(PathBuf),
    /// Standard output.
    Stdout,
}

/// One output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OutputSpec {
    /// What is made.
    pub(crate) kind: OutputKind,
    /// Where it goes, for kinds that leave the store.
    pub(crate) dest: Option<Dest>,
    /// Everything else that was said, such as `name`, `push` and `compression`.
    pub(crate) attrs: BTreeMap<String, String>,
}

/// Why an output cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OutputError(String);

impl fmt::Display for OutputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OutputError {}

impl From<OutputError> for Failure {
    fn from(error: OutputError) -> Self {
        Self::new(error.0)
    }
}

fn bad<T>(message: impl Into<String>) -> Result<T, OutputError> {
    Err(OutputError(message.into()))
}

impl OutputSpec {
    /// Makes an output with neither destination nor attributes.
    pub(crate) fn new(kind: OutputKind) -> Self {
        Self { kind, dest: None, attrs: BTreeMap::new() }
    }

    /// Whether the destination is a folder rather than a file.
    pub(crate) fn is_folder(&self) -> bool {
        self.kind == OutputKind::Local || self.switch("tar") == Some(false)
    }

    /// Whether the output writes to standard output.
    pub(crate) fn uses_stdout(&self) -> bool {
        self.dest == Some(Dest::Stdout)
    }

    /// Returns a boolean attribute; `None` if it is missing or not a boolean, which the exporter reports.
    fn switch(&self, name: &str) -> Option<bool> {
        crate::args::value::boolean(self.attrs.get(name)?).ok()
    }

    fn pushes(&self) -> bool {
        self.switch("push") == Some(true)
    }
}

/// Parses the value of one `-o`.
///
/// A lone word is a folder for `type=local`, and `-` is a tar on standard output. Anything else is a list of
/// `key=value` in CSV.
///
/// # Errors
/// When the type is missing or unknown, a pair is malformed, or the destination does not fit the type.
pub(crate) fn parse_output(text: &str) -> Result<OutputSpec, OutputError> {
    let fields = csv::fields(text)
        .map_err(|reason| OutputError(format!("invalid output {text:?}: {reason}")))?;
    if let [word] = fields.as_slice()
        && word == text
        && !word.starts_with("type=")
    {
        return match word.as_str() {
            "" => bad("the output is empty: expected a folder, - or type=…"),
            "-" => Ok(OutputSpec { dest: Some(Dest::Stdout), ..OutputSpec::new(OutputKind::Tar) }),
            folder => Ok(OutputSpec {
                dest: Some(Dest::Path(folder.into())),
                ..OutputSpec::new(OutputKind::Local)
            }),
        };
    }
    let (mut kind, mut dest, mut attrs) = (None, None, BTreeMap::new());
    for field in &fields {
        let Some((key, value)) = field.split_once('=') else {
            return bad(format!("invalid output {text:?}: {field:?} is not of the form key=value"));
        };
        let key = key.trim().to_ascii_lowercase();
        match key.as_str() {
            "type" => match OutputKind::ALL.iter().find(|kind| kind.as_str() == value) {
                Some(found) => kind = Some(*found),
                None => {
                    let known = OutputKind::ALL.map(OutputKind::as_str).join(", ");
                    return bad(format!("unknown output type {value:?}: expected one of {known}"));
                }
            },
            "dest" => dest = Some(value.to_owned()),
            "" => return bad(format!("invalid output {text:?}: {field:?} has no key")),
            _ => drop(attrs.insert(key, value.to_owned())),
        }
    }
    let Some(kind) = kind else {
        return bad(format!("invalid output {text:?}: type= is missing"));
    };
    let mut output = OutputSpec { kind, dest: None, attrs };
    output.dest = check_dest(&output, dest.as_deref())?;
    if kind == OutputKind::Registry {
        output.attrs.entry("push".into()).or_insert_with(|| "true".into());
    }
    Ok(output)
}

fn check_dest(output: &OutputSpec, dest: Option<&str>) -> Result<Option<Dest>, OutputError> {
    let kind = output.kind.as_str();
    match (output.kind, dest) {
        (OutputKind::Image | OutputKind::Registry | OutputKind::CacheOnly, None) => Ok(None),
        (OutputKind::Image | OutputKind::Registry | OutputKind::CacheOnly, Some(_)) => {
            bad(format!("type={kind} takes no dest: use type=oci or type=docker to write a file"))
        }
        (OutputKind::Docker, _) if output.attrs.contains_key("context") => bad(
            "not supported yet: context= of type=docker; write a tarball with dest= and load it there",
        ),
        (_, Some("")) => bad(format!("dest of type={kind} is empty")),
        (OutputKind::Local, None) => bad("type=local needs dest=, the folder to write to"),
        (OutputKind::Oci | OutputKind::Docker, None | Some("-")) if output.is_folder() => {
            bad(format!("type={kind},tar=false needs dest=, the folder to write to"))
        }
        (OutputKind::Local, Some("-")) => {
            bad("type=local cannot write to standard output: use type=tar")
        }
        (OutputKind::Docker, None) => Ok(None),
        (OutputKind::Oci | OutputKind::Tar, None) | (_, Some("-")) => Ok(Some(Dest::Stdout)),
        (_, Some(path)) => Ok(Some(Dest::Path(path.into()))),
    }
}

/// What the other flags of a build say about its outputs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutputFlags<'a> {
    /// `--push`.
    pub(crate) push: bool,
    /// `--load`.
    pub(crate) load: bool,
    /// `--tag`.
    pub(crate) tags: &'a [ImageReference],
    /// `--annotation`.
    pub(crate) annotations: &'a [Annotation],
    /// Whether standard output is a terminal.
    pub(crate) stdout_is_terminal: bool,
}

/// Completes and checks the outputs of one build. With none given, the result becomes an image in the store.
///
/// Afterwards an image in the store is always `Image`: `Registry` is one with `push=true`, and `Docker` without a
/// destination, which loads the result into the engine's own store, is one too.
///
/// # Errors
/// When two outputs want standard output, a terminal would receive a tar, or a push has no name.
pub(crate) fn resolve_outputs(
    specs: &[OutputSpec],
    flags: OutputFlags<'_>,
) -> Result<Vec<OutputSpec>, OutputError> {
    let mut outputs = specs.to_vec();
    for output in &mut outputs {
        if output.kind == OutputKind::Registry
            || (output.kind == OutputKind::Docker && output.dest.is_none())
        {
            output.kind = OutputKind::Image;
        }
    }
    let no_image =
        |outputs: &[OutputSpec]| !outputs.iter().any(|output| output.kind == OutputKind::Image);
    if outputs.is_empty() || ((flags.push || flags.load) && no_image(&outputs)) {
        outputs.push(OutputSpec::new(OutputKind::Image));
    }
    if flags.push {
        for output in outputs.iter_mut().filter(|output| output.kind == OutputKind::Image) {
            output.attrs.insert("push".into(), "true".into());
        }
    }
    for output in outputs.iter_mut().filter(|output| output.kind.is_image()) {
        describe(&mut output.attrs, flags.tags, flags.annotations);
    }
    if let Some(nameless) =
        outputs.iter().find(|o| o.pushes() && o.attrs.get("name").is_none_or(String::is_empty))
    {
        let kind = nameless.kind.as_str();
        return bad(format!(
            "a name is needed to push the result: add -t NAME, or name= to the type={kind} output"
        ));
    }
    match outputs.iter().filter(|output| output.uses_stdout()).count() {
        0 => {}
        1 if flags.stdout_is_terminal => {
            return bad(
                "refusing to write an archive to the terminal: redirect standard output or give dest=FILE",
            );
        }
        1 => {}
        _ => {
            return bad(
                "only one output can be written to standard output: give the others dest=FILE",
            );
        }
    }
    Ok(outputs)
}

/// Adds what flags say of every image to the attributes of one.
pub(crate) fn describe(
    attrs: &mut BTreeMap<String, String>,
    tags: &[ImageReference],
    annotations: &[Annotation],
) {
    if !tags.is_empty() {
        let names: Vec<_> = tags.iter().map(ToString::to_string).collect();
        attrs.insert("name".into(), names.join(","));
    }
    attrs.extend(annotations.iter().flat_map(Annotation::attributes));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: OutputKind, dest: Option<&str>, attrs: &[(&str, &str)]) -> OutputSpec {
        OutputSpec {
            kind,
            dest: dest.map(|dest| if dest == "-" { Dest::Stdout } else { Dest::Path(dest.into()) }),
            attrs: attrs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        }
    }

    #[test]
    fn grammar() {
        use OutputKind::*;
        for (text, expected) in [
            ("out", spec(Local, Some("out"), &[])),
            ("dest=odd", spec(Local, Some("dest=odd"), &[])),
            ("-", spec(Tar, Some("-"), &[])),
            ("type=local,dest=out", spec(Local, Some("out"), &[])),
            ("type=tar", spec(Tar, Some("-"), &[])),
            ("type=tar,dest=-", spec(Tar, Some("-"), &[])),
            ("type=tar,dest=a.tar", spec(Tar, Some("a.tar"), &[])),
            ("type=oci", spec(Oci, Some("-"), &[])),
            ("type=oci,dest=a,tar=false", spec(Oci, Some("a"), &[("tar", "false")])),
            ("type=docker", spec(Docker, None, &[])),
            ("type=docker,dest=-", spec(Docker, Some("-"), &[])),
            ("type=image", spec(Image, None, &[])),
            ("type=image,name=a,push=true", spec(Image, None, &[("name", "a"), ("push", "true")])),
            ("TYPE=image, Compression=zstd", spec(Image, None, &[("compression", "zstd")])),
            ("type=image,\"name=a,b\"", spec(Image, None, &[("name", "a,b")])),
            ("type=image,name=a=b", spec(Image, None, &[("name", "a=b")])),
            ("type=image,name=a,name=b", spec(Image, None, &[("name", "b")])),
            ("type=registry,name=a", spec(Registry, None, &[("name", "a"), ("push", "true")])),
            ("type=registry,push=false", spec(Registry, None, &[("push", "false")])),
            ("type=cacheonly", spec(CacheOnly, None, &[])),
            ("\"type=local\",\"dest=a \"\"b\"\"\"", spec(Local, Some("a \"b\""), &[])),
        ] {
            assert_eq!(parse_output(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn refusals() {
        for (text, part) in [
            ("", "empty"),
            ("type=", "unknown output type"),
            ("type=zip", "unknown output type \"zip\""),
            ("type=local", "needs dest"),
            ("type=local,dest=", "is empty"),
            ("type=local,dest=-", "standard output"),
            ("dest=a,name=b", "type= is missing"),
            ("type=oci,bare", "key=value"),
            ("type=oci,=x", "no key"),
            ("type=oci,tar=false", "needs dest"),
            ("type=docker,tar=false,dest=-", "needs dest"),
            ("type=image,dest=x", "takes no dest"),
            ("type=cacheonly,dest=x", "takes no dest"),
            ("type=docker,context=remote", "not supported yet"),
            ("type=image,\"name=a", "quote"),
            ("a,b", "key=value"),
        ] {
            let error = parse_output(text).unwrap_err();
            assert!(error.0.contains(part), "{text}: {error}");
        }
    }

    fn resolve(
        texts: &[&str],
        push: bool,
        load: bool,
        tags: &[&str],
    ) -> Result<Vec<OutputSpec>, OutputError> {
        let specs: Vec<_> = texts.iter().map(|text| parse_output(text).unwrap()).collect();
        let tags: Vec<_> = tags.iter().map(|tag| tag.parse().unwrap()).collect();
        resolve_outputs(
            &specs,
            OutputFlags { push, load, tags: &tags, annotations: &[], stdout_is_terminal: false },
        )
    }

    #[test]
    fn push_and_load_complete_the_outputs() {
        use OutputKind::*;
        let named: &[_] = &[("name", "docker.io/library/t:latest")];
        let pushed: &[_] = &[("name", "docker.io/library/t:latest"), ("push", "true")];
        for (texts, push, load, expected) in [
            (&[][..], false, false, vec![spec(Image, None, named)]),
            (&[], false, true, vec![spec(Image, None, named)]),
            (&[], true, false, vec![spec(Image, None, pushed)]),
            (&[], true, true, vec![spec(Image, None, pushed)]),
            (&["out"], false, false, vec![spec(Local, Some("out"), &[])]),
            (&["out"], true, false, vec![spec(Local, Some("out"), &[]), spec(Image, None, pushed)]),
            (
                &["type=oci,dest=f"],
                false,
                true,
                vec![spec(Oci, Some("f"), named), spec(Image, None, named)],
            ),
            (&["type=image"], true, true, vec![spec(Image, None, pushed)]),
            (&["type=docker"], false, true, vec![spec(Image, None, named)]),
            (&["type=registry"], false, true, vec![spec(Image, None, pushed)]),
            (&["type=image,push=false"], true, false, vec![spec(Image, None, pushed)]),
            (&["type=cacheonly"], false, false, vec![spec(CacheOnly, None, &[])]),
        ] {
            assert_eq!(resolve(texts, push, load, &["t"]), Ok(expected), "{texts:?} {push} {load}");
        }
    }

    #[test]
    fn tags_become_the_name_and_a_push_needs_one() {
        let outputs = resolve(&["type=image,name=x"], false, false, &["a", "b:1"]).unwrap();
        assert_eq!(outputs[0].attrs["name"], "docker.io/library/a:latest,docker.io/library/b:1");
        assert_eq!(
            resolve(&["type=image,name=x"], true, false, &[]).unwrap()[0].attrs["name"],
            "x"
        );
        assert!(resolve(&[], true, false, &[]).unwrap_err().0.contains("-t NAME"));
        assert!(resolve(&["type=registry"], false, false, &[]).is_err());
    }

    #[test]
    fn annotations_go_to_images_only() {
        let annotations = [crate::args::annotation::annotation("index:a=b").unwrap()];
        let specs = [parse_output("out").unwrap(), parse_output("type=oci,dest=x").unwrap()];
        let flags = OutputFlags {
            push: false,
            load: false,
            tags: &[],
            annotations: &annotations,
            stdout_is_terminal: false,
        };
        let outputs = resolve_outputs(&specs, flags).unwrap();
        assert!(outputs[0].attrs.is_empty());
        assert_eq!(outputs[1].attrs["annotation-index.a"], "b");
    }

    #[test]
    fn standard_output_is_for_one_archive_and_no_terminal() {
        assert!(resolve(&["-", "type=oci"], false, false, &[]).unwrap_err().0.contains("only one"));
        let flags = OutputFlags {
            push: false,
            load: false,
            tags: &[],
            annotations: &[],
            stdout_is_terminal: true,
        };
        assert!(
            resolve_outputs(&[parse_output("-").unwrap()], flags)
                .unwrap_err()
                .0
                .contains("terminal")
        );
        assert!(resolve_outputs(&[parse_output("type=tar,dest=x").unwrap()], flags).is_ok());
        assert!(parse_output("out").unwrap().is_folder());
        assert!(parse_output("type=oci,tar=false,dest=x").unwrap().is_folder());
        assert!(!parse_output("type=oci,dest=x").unwrap().is_folder());
    }
}
