//! What a result is made from, as far as its graph tells: images, repositories, downloads, folders, and what steps used of the
//! client.

use slipway_spec::credentials::redact;
use slipway_spec::llb::pb;
use slipway_spec::{Digest, Platform};

/// What a result is made from. Nothing is named twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Materials {
    /// Images, and what their names stood for.
    pub images: Vec<ImageMaterial>,
    /// Single blobs of registries and layouts.
    pub blobs: Vec<BlobMaterial>,
    /// Repositories.
    pub git: Vec<GitMaterial>,
    /// Downloads.
    pub http: Vec<HttpMaterial>,
    /// Folders of the client, by name. What was in them is not told.
    pub locals: Vec<String>,
    /// Secrets that steps may have seen.
    pub secrets: Vec<Use>,
    /// SSH agents that steps may have used.
    pub ssh: Vec<Use>,
    /// Whether a step had a network.
    pub network: bool,
    /// Whether something went in that is not told.
    pub incomplete: bool,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageMaterial {
    /// Its full name.
    pub reference: String,
    /// The platform that was used of it.
    pub platform: Option<Platform>,
    /// The index or manifest that the name stood for.
    pub digest: Digest,
    /// Whether it came from a layout of the client.
    pub local: bool,
}

/// A blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobMaterial {
    /// The full name, with the digest.
    pub reference: String,
    /// The digest.
    pub digest: Digest,
    /// Whether it came from a layout of the client.
    pub local: bool,
}

/// A repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GitMaterial {
    /// The remote and, behind `#`, the ref; without credentials.
    pub url: String,
    /// The object that the ref stood for.
    pub commit: String,
}

/// A download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpMaterial {
    /// The URL, without credentials.
    pub url: String,
    /// What it gave.
    pub digest: Digest,
}

/// Something of the client that a step may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// Its name.
    pub id: String,
    /// Whether the step does without it.
    pub optional: bool,
}

impl Materials {
    /// Adds an image unless it is there for the same platform.
    pub fn add_image(&mut self, image: ImageMaterial) {
        let same = |known: &ImageMaterial| {
            let platforms = match (&known.platform, &image.platform) {
                (None, None) => true,
                // Images that differ in features of the system alone are not told apart.
                (Some(a), Some(b)) => {
                    (&a.os, &a.architecture, &a.variant, &a.os_version)
                        == (&b.os, &b.architecture, &b.variant, &b.os_version)
                }
                _ => false,
            };
            known.reference == image.reference && known.local == image.local && platforms
        };
        if !self.images.iter().any(same) {
            self.images.push(image);
        }
    }

    /// Adds a blob.
    pub(crate) fn add_blob(&mut self, blob: BlobMaterial) {
        let same =
            |known: &BlobMaterial| known.reference == blob.reference && known.local == blob.local;
        if !self.blobs.iter().any(same) {
            self.blobs.push(blob);
        }
    }

    /// Adds a repository.
    pub(crate) fn add_git(&mut self, git: GitMaterial) {
        let git = GitMaterial { url: redact(&git.url), ..git };
        if !self.git.iter().any(|known| known.url == git.url) {
            self.git.push(git);
        }
    }

    /// Adds a download.
    pub(crate) fn add_http(&mut self, http: HttpMaterial) {
        let http = HttpMaterial { url: redact(&http.url), ..http };
        if !self.http.iter().any(|known| known.url == http.url) {
            self.http.push(http);
        }
    }

    /// Adds a secret.
    pub(crate) fn add_secret(&mut self, id: &str, optional: bool) {
        add_use(&mut self.secrets, id, optional);
    }

    /// Adds an SSH agent.
    pub(crate) fn add_ssh(&mut self, id: &str, optional: bool) {
        add_use(&mut self.ssh, if id.is_empty() { "default" } else { id }, optional);
    }

    /// Adds what the process of a step may use.
    pub(crate) fn add_exec(&mut self, exec: &pb::ExecOp) {
        for mount in &exec.mounts {
            if mount.mount_type == pb::MountType::Secret as i32 {
                let (id, optional) =
                    mount.secret_opt.as_ref().map_or(("", false), |s| (&s.id, s.optional));
                self.add_secret(id, optional);
            }
            if mount.mount_type == pb::MountType::Ssh as i32 {
                let (id, optional) =
                    mount.ssh_opt.as_ref().map_or(("", false), |s| (&s.id, s.optional));
                self.add_ssh(id, optional);
            }
        }
        for variable in &exec.secretenv {
            self.add_secret(&variable.id, variable.optional);
        }
        self.network |= exec.network != pb::NetMode::None as i32;
    }

    /// Adds a folder of the client.
    pub(crate) fn add_folder(&mut self, identifier: &str) {
        let name = identifier.trim_start_matches("local://");
        if !self.locals.iter().any(|known| known == name) {
            self.locals.push(name.to_owned());
        }
    }

    /// Puts everything in an order that says nothing of how it was found.
    pub fn sort(&mut self) {
        self.images.sort_by(|a, b| a.reference.cmp(&b.reference));
        self.blobs.sort_by(|a, b| a.reference.cmp(&b.reference));
        self.git.sort_by(|a, b| a.url.cmp(&b.url));
        self.http.sort_by(|a, b| a.url.cmp(&b.url));
        self.locals.sort();
        self.secrets.sort_by(|a, b| a.id.cmp(&b.id));
        self.ssh.sort_by(|a, b| a.id.cmp(&b.id));
    }
}

/// A step that needs a thing counts for more than one that does without.
fn add_use(uses: &mut Vec<Use>, id: &str, optional: bool) {
    match uses.iter_mut().find(|known| known.id == id) {
        Some(known) => known.optional &= optional,
        None => uses.push(Use { id: id.to_owned(), optional }),
    }
}
