//! Text in columns, laid out as Go's `text/tabwriter` does.

use std::fmt;

/// Rows of cells. The last cell of a row has no width of its own.
#[derive(Debug)]
pub(super) struct Table {
    padding: usize,
    /// Cells may contain tabs and line ends, which then make more cells and rows.
    text: String,
}

impl Table {
    /// Makes a table with this many blanks between columns.
    pub(super) fn new(padding: usize) -> Self {
        Self { padding, text: String::new() }
    }

    pub(super) fn row(&mut self, cells: &[&str]) {
        self.text.push_str(&cells.join("\t"));
        self.text.push('\n');
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<Vec<&str>> = self.text.lines().map(|row| row.split('\t').collect()).collect();
        let mut widths = vec![vec![]; rows.len()];
        self.layout(&rows, &mut widths, 0, rows.len());
        for (row, widths) in rows.iter().zip(widths) {
            for (position, cell) in row.iter().enumerate() {
                f.write_str(cell)?;
                if let Some(width) = widths.get(position) {
                    let blanks = width - cell.chars().count();
                    write!(f, "{:blanks$}", "")?;
                }
            }
            f.write_str("\n")?;
        }
        Ok(())
    }
}

impl Table {
    /// Gives the rows of a range, which have the same columns so far, their next column. Rows that have it and stand
    /// together share its width.
    fn layout(&self, rows: &[Vec<&str>], widths: &mut [Vec<usize>], first: usize, end: usize) {
        let Some(column) = widths.get(first).map(Vec::len) else { return };
        let has = |row: usize| column + 1 < rows[row].len();
        let mut row = first;
        while row < end {
            if !has(row) {
                row += 1;
                continue;
            }
            let start = row;
            while row < end && has(row) {
                row += 1;
            }
            let cells = rows[start..row].iter().map(|row| row[column].chars().count());
            let width = cells.max().unwrap_or(0) + self.padding;
            widths[start..row].iter_mut().for_each(|widths| widths.push(width));
            self.layout(rows, widths, start, row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(3);
        table.row(&["BUILD ARG", "VALUE", "DESCRIPTION"]);
        table.row(&["a", "", "first"]);
        table.row(&["ä", "a longer value", ""]);
        assert_eq!(
            table.to_string(),
            "BUILD ARG   VALUE            DESCRIPTION\na                            first\nä           a longer value   \n"
        );
    }

    #[test]
    fn a_row_with_fewer_cells_parts_columns() {
        let mut table = Table::new(1);
        for cells in [
            &["wide cell", "x", "y"][..],
            &["line\nbreak", "x"],
            &["a", "bbb", "c"],
            &["a", "b", "c"],
        ] {
            table.row(cells);
        }
        assert_eq!(table.to_string(), "wide cell x y\nline\nbreak x\na     bbb c\na     b   c\n");
    }
}
