//! Where file systems come from.

pub mod image;
