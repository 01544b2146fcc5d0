//! Tables with aligned columns, in docker's spacing.

use std::fmt;

use unicode_width::UnicodeWidthStr as _;

use super::text::clean;

/// Blanks between two columns.
const GAP: usize = 3;
/// The least width of a column with its gap.
const MIN_WIDTH: usize = 10;

/// Rows under a heading.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Makes a table with a heading and no rows.
    pub(crate) fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(|&cell| cell.into()).collect()] }
    }

    /// Adds a row. Cells lose control characters, so that a name cannot play with the terminal.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| clean(&cell)).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let widest = self
                    .rows
                    .iter()
                    .filter_map(|row| row.get(column))
                    .map(|cell| cell.width())
                    .max();
                (widest.unwrap_or(0) + GAP).max(MIN_WIDTH)
            })
            .collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.width())));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_by_width_on_screen() {
        let mut table = Table::new(&["NAME", "SIZE", "NOTE"]);
        table.row(["a-longer-name".into(), "1B".into(), String::new()]);
        table.row(["日本".into(), "12.3MB".into(), "x\x1b[31my\n".into()]);
        assert_eq!(
            table.to_string(),
            "NAME            SIZE      NOTE\na-longer-name   1B\n日本            12.3MB    xy\n"
        );
    }
}
