//! `slipway images`.

use std::time::SystemTime;

use serde_json::json;
use slipway_spec::{Digest, ImageReference, Platform};

use super::Context;
use crate::args::image::{ImagesArgs, ListFormat};
use crate::printer::size::human;
use crate::printer::table::Table;
use crate::printer::time::{ago, listed};

/// One name of an image in the store, or an image without a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageRow {
    /// The name; `None` for an untagged image.
    pub(crate) name: Option<ImageReference>,
    /// The index, or the manifest of a single image.
    pub(crate) digest: Digest,
    /// When it was made.
    pub(crate) created: Option<SystemTime>,
    /// The bytes of all blobs that are in the store.
    pub(crate) size_bytes: u64,
    /// What it runs on.
    pub(crate) platforms: Vec<PlatformRow>,
}

/// The image of one platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PlatformRow {
    /// What it runs on.
    pub(crate) platform: Platform,
    /// Its manifest.
    pub(crate) digest: Digest,
    /// The bytes of its blobs that are in the store.
    pub(crate) size_bytes: u64,
    /// Whether all of it is in the store.
    pub(crate) is_present: bool,
}

const NO_NAME: &str = "<none>";

impl ImageRow {
    fn repository(&self) -> String {
        self.name.as_ref().map_or_else(|| NO_NAME.into(), ImageReference::familiar_repository)
    }

    fn tag(&self) -> &str {
        self.name.as_ref().and_then(ImageReference::tag).unwrap_or(NO_NAME)
    }

    fn id(&self, full: bool) -> String {
        if full { self.digest.to_string() } else { self.digest.short().into() }
    }

    fn created(&self, now: SystemTime) -> String {
        self.created.map_or_else(|| "N/A".into(), |created| ago(now, created))
    }

    /// Returns the platforms that are in the store.
    fn present(&self) -> Vec<String> {
        self.platforms
            .iter()
            .filter(|row| row.is_present)
            .map(|row| row.platform.to_string())
            .collect()
    }

    fn matches(&self, wanted: &str) -> bool {
        self.name.as_ref().is_some_and(|name| {
            let repository = [name.repository(), name.familiar_repository()];
            let tagged = name
                .tag()
                .map(|tag| repository.each_ref().map(|repository| format!("{repository}:{tag}")));
            repository.iter().chain(tagged.iter().flatten()).any(|form| form == wanted)
        })
    }
}

/// Prints the images, sorted by name, untagged ones last.
pub(crate) fn print(args: &ImagesArgs, rows: &[ImageRow], now: SystemTime, context: &Context) {
    let mut rows: Vec<&ImageRow> = rows
        .iter()
        .filter(|row| {
            args.name.as_ref().map_or(args.all || row.name.is_some(), |wanted| row.matches(wanted))
        })
        .collect();
    rows.sort_by_cached_key(|row| {
        (row.name.is_none(), row.repository(), row.tag().to_owned(), row.digest.clone())
    });
    if args.quiet {
        print_ids(args, &rows, context);
    } else if args.tree {
        context.printer.table(&tree(&rows));
    } else if args.format == Some(ListFormat::Json) {
        print_json(args, &rows, now, context);
    } else {
        context.printer.table(&table(args, &rows, now));
    }
}

/// Prints each id once, so that the list can be given to `rmi`.
fn print_ids(args: &ImagesArgs, rows: &[&ImageRow], context: &Context) {
    let mut seen = vec![];
    for row in rows {
        let id = row.id(args.no_trunc);
        if !seen.contains(&id) {
            context.printer.line(&id);
            seen.push(id);
        }
    }
}

fn table(args: &ImagesArgs, rows: &[&ImageRow], now: SystemTime) -> Table {
    let digest_heading: &[&str] = if args.digests { &["DIGEST"] } else { &[] };
    // The platforms stand last: scripts count columns from the left.
    let heading =
        [&["REPOSITORY", "TAG"], digest_heading, &["IMAGE ID", "CREATED", "SIZE", "PLATFORMS"]]
            .concat();
    let mut table = Table::new(&heading);
    for row in rows {
        let mut cells = vec![row.repository(), row.tag().to_owned()];
        if args.digests {
            cells.push(row.digest.to_string());
        }
        cells.extend([
            row.id(args.no_trunc),
            row.created(now),
            human(row.size_bytes),
            row.present().join(", "),
        ]);
        table.row(cells);
    }
    table
}

/// Shows a row for each image and one for each of its platforms; what is not in the store is said to be missing.
fn tree(rows: &[&ImageRow]) -> Table {
    let mut table = Table::new(&["IMAGE", "ID", "SIZE", "STORED"]);
    for row in rows {
        let name = row.name.as_ref().map_or_else(|| "<untagged>".into(), ImageReference::familiar);
        table.row([name, row.id(false), human(row.size_bytes), String::new()]);
        for (n, platform) in row.platforms.iter().enumerate() {
            let branch = if n + 1 == row.platforms.len() { "└─" } else { "├─" };
            table.row([
                format!("{branch} {}", platform.platform),
                platform.digest.short().into(),
                human(platform.size_bytes),
                if platform.is_present { "yes" } else { "no" }.into(),
            ]);
        }
    }
    table
}

fn print_json(args: &ImagesArgs, rows: &[&ImageRow], now: SystemTime, context: &Context) {
    for row in rows {
        let created_at = row.created.map_or_else(|| "N/A".into(), listed);
        let line = json!({
            "Containers": "N/A",
            "CreatedAt": created_at,
            "CreatedSince": row.created(now),
            "Digest": row.digest.to_string(),
            "ID": row.id(args.no_trunc),
            "Platforms": row.present(),
            "Repository": row.repository(),
            "SharedSize": "N/A",
            "Size": human(row.size_bytes),
            "Tag": row.tag(),
            "UniqueSize": "N/A",
        });
        context.printer.line(&line.to_string());
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::args::Command;
    use crate::command::testing;

    fn rows() -> Vec<ImageRow> {
        let row = |name: Option<&str>, content: &[u8], platforms: &[(&str, bool)]| ImageRow {
            name: name.map(|name| name.parse().unwrap()),
            digest: Digest::of(content),
            created: (content != b"3").then_some(UNIX_EPOCH),
            size_bytes: 12_345_678,
            platforms: platforms
                .iter()
                .map(|(platform, is_present)| PlatformRow {
                    platform: platform.parse().unwrap(),
                    digest: Digest::of(platform.as_bytes()),
                    size_bytes: if *is_present { 5000 } else { 0 },
                    is_present: *is_present,
                })
                .collect(),
        };
        vec![
            row(None, b"3", &[]),
            row(
                Some("localhost:5000/app:v1"),
                b"1",
                &[("linux/amd64", true), ("linux/arm64", true), ("linux/arm", false)],
            ),
            row(Some("debian:12"), b"2", &[("linux/amd64", true)]),
            row(Some("debian:11"), b"2", &[("linux/amd64", true)]),
        ]
    }

    fn printed(words: &[&str]) -> String {
        let (context, stdout, stderr) = testing::context(&[]);
        let Command::Images(args) = testing::command(&[&["images"], words].concat()) else {
            panic!("not images")
        };
        print(&args, &rows(), UNIX_EPOCH + Duration::from_secs(7200), &context);
        assert_eq!(stderr.take(), "");
        stdout.take()
    }

    fn short(content: &[u8]) -> String {
        Digest::of(content).short().to_owned()
    }

    #[test]
    fn a_table_like_dockers_with_platforms_at_its_end() {
        let (one, two, three) = (short(b"1"), short(b"2"), short(b"3"));
        let expected = format!(
            "\
REPOSITORY           TAG       IMAGE ID       CREATED       SIZE      PLATFORMS
debian               11        {two}   2 hours ago   12.3MB    linux/amd64
debian               12        {two}   2 hours ago   12.3MB    linux/amd64
localhost:5000/app   v1        {one}   2 hours ago   12.3MB    linux/amd64, linux/arm64
"
        );
        assert_eq!(printed(&[]), expected);
        assert_eq!(
            printed(&["-a"]),
            format!("{expected}<none>               <none>    {three}   N/A           12.3MB\n")
        );
        for name in ["debian", "docker.io/library/debian"] {
            assert_eq!(printed(&[name]).lines().count(), 3);
        }
        assert_eq!(printed(&["debian:12"]).lines().count(), 2);
        assert_eq!(printed(&["deb"]).lines().count(), 1);
        assert!(
            printed(&["--digests", "--no-trunc"])
                .contains(&format!("{d}   {d}", d = Digest::of(b"1")))
        );
    }

    #[test]
    fn a_tree_has_a_row_for_each_platform() {
        let id = |platform: &str| short(platform.as_bytes());
        let expected = format!(
            "\
├─ linux/amd64          {}   5kB       yes
├─ linux/arm64          {}   5kB       yes
└─ linux/arm/v7         {}   0B        no
",
            id("linux/amd64"),
            id("linux/arm64"),
            id("linux/arm"),
        );
        let printed = printed(&["--tree"]);
        assert!(printed.starts_with("IMAGE ") && printed.ends_with(&expected), "{printed}");
    }

    #[test]
    fn ids_and_json_for_scripts() {
        assert_eq!(printed(&["-q"]), format!("{}\n{}\n", short(b"2"), short(b"1")));
        assert_eq!(printed(&["-q", "--no-trunc", "debian:11"]), format!("{}\n", Digest::of(b"2")));
        let lines: Vec<serde_json::Value> = printed(&["--format", "json"])
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[2]["Repository"], "localhost:5000/app");
        assert_eq!(lines[2]["Platforms"], json!(["linux/amd64", "linux/arm64"]));
        assert_eq!(lines[2]["CreatedAt"], "1970-01-01 00:00:00 +0000 UTC");
    }
}
