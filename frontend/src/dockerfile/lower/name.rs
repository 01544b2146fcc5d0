//! What progress calls a step: `[linux/amd64->arm64 build 2/5] RUN make`.

use slipway_spec::Platform;

use super::super::expand::{Env, Lexer};
use super::super::stage::{Plan, Stage, format_all};

/// Returns the part in brackets, with a blank after it.
pub(super) fn prefix(
    plan: &Plan<'_>,
    stage: &Stage,
    number: usize,
    platform: &Platform,
    env: Option<&Env>,
    trigger: bool,
) -> String {
    let mut text = String::from("[");
    if plan.settings.multi_platform || plan.platform.normalized() != plan.settings.build_platform {
        text.push_str(&format_all(platform));
        if let Some(target) = env.and_then(target_in) {
            text.push_str(&arrow(platform, target));
        }
        text.push(' ');
    }
    if !stage.label.is_empty() {
        text.push_str(&stage.label);
        text.push(' ');
    }
    let total = stage.total;
    let width = total.max(1).to_string().len();
    text.push_str(&format!("{number:>width$}/{total}] "));
    if trigger {
        text.push_str("ONBUILD ");
    }
    text
}

/// Writes an instruction as it is run: variables expanded, the keyword in capitals.
pub(super) fn instruction(code: &str, lexer: Lexer, env: &Env) -> String {
    let text = lexer.word(code, env).map_or_else(|_| code.to_owned(), |expansion| expansion.text);
    match text.split_once(' ') {
        Some((keyword, rest)) => format!("{} {rest}", keyword.to_uppercase()),
        None => text.to_uppercase(),
    }
}

/// The platform that a stage was told to make things for.
struct Target {
    os: String,
    architecture: String,
    variant: String,
}

fn target_in(env: &Env) -> Option<Target> {
    let mut target =
        Target { os: String::new(), architecture: String::new(), variant: String::new() };
    let mut any = false;
    for (name, value) in env.iter() {
        let field = match name {
            "TARGETPLATFORM" => match Platform::parse_raw(value) {
                Ok(platform) => {
                    let variant = platform.variant.unwrap_or_default();
                    return Some(Target {
                        os: platform.os,
                        architecture: platform.architecture,
                        variant,
                    });
                }
                Err(_) => continue,
            },
            "TARGETOS" => &mut target.os,
            "TARGETARCH" => &mut target.architecture,
            "TARGETVARIANT" => &mut target.variant,
            _ => continue,
        };
        value.clone_into(field);
        any = true;
    }
    any.then_some(target)
}

fn arrow(base: &Platform, target: Target) -> String {
    let or = |text: String, default: &str| if text.is_empty() { default.to_owned() } else { text };
    let variant = Some(target.variant.as_str()).filter(|variant| !variant.is_empty());
    let target = Platform::new(
        &or(target.os, &base.os),
        &or(target.architecture, &base.architecture),
        variant,
    );
    if target.os != base.os {
        return format!("->{}", format_all(&target));
    }
    if target.architecture == base.architecture {
        return String::new();
    }
    match target.variant {
        Some(variant) => format!("->{}/{variant}", target.architecture),
        None => format!("->{}", target.architecture),
    }
}
