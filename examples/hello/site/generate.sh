#!/bin/sh
# Turns pages/*.md into HTML: headings, paragraphs, lists, code, links, emphasis. Enough for these pages.
#
#   generate.sh SOURCE DESTINATION
set -eu

source=$1 destination=$2
mkdir -p "$destination"
cp "$source/style.css" "$destination/"

title_of() { sed -n 's/^# //p;T;q' "$1"; }

menu=
for page in "$source"/pages/*.md; do
    name=$(basename "$page" .md)
    menu="$menu<a href=\"/$name.html\">$(title_of "$page")</a> "
done

for page in "$source"/pages/*.md; do
    name=$(basename "$page" .md)
    TITLE=$(title_of "$page") MENU=$menu awk '
        function inline(text) {
            gsub(/&/, "\\&amp;", text); gsub(/</, "\\&lt;", text); gsub(/>/, "\\&gt;", text)
            while (match(text, /\[[^]]*\]\([^)]*\)/)) {
                link = substr(text, RSTART + 1, RLENGTH - 2)
                split(link, part, /\]\(/)
                text = substr(text, 1, RSTART - 1) "<a href=\"" part[2] "\">" part[1] "</a>" substr(text, RSTART + RLENGTH)
            }
            while (match(text, /`[^`]*`/))
                text = substr(text, 1, RSTART - 1) "<code>" substr(text, RSTART + 1, RLENGTH - 2) "</code>" substr(text, RSTART + RLENGTH)
            while (match(text, /\*[^*]+\*/))
                text = substr(text, 1, RSTART - 1) "<em>" substr(text, RSTART + 1, RLENGTH - 2) "</em>" substr(text, RSTART + RLENGTH)
            return text
        }
        function close_block() {
            if (block != "") body = body "</" block ">\n"
            block = ""
        }
        function open_block(kind) {
            if (block != kind) { close_block(); body = body "<" kind ">\n"; block = kind }
        }
        FNR == NR && !/^```/ && !code && /^# /  { close_block(); body = body "<h1>" inline(substr($0, 3)) "</h1>\n"; next }
        FNR == NR && /^```/ { if (code) { body = body "</pre>\n"; code = 0 } else { close_block(); body = body "<pre>"; code = 1 } next }
        FNR == NR && code   { body = body inline($0) "\n"; next }
        FNR == NR && /^$/   { close_block(); next }
        FNR == NR && /^- /  { open_block("ul"); body = body "<li>" inline(substr($0, 3)) "</li>\n"; next }
        FNR == NR           { open_block("p"); body = body inline($0) "\n"; next }
        FNR == 1            { close_block() }
        {
            if ($0 == "{{body}}") { printf "%s", body; next }
            at = index($0, "{{title}}"); if (at) $0 = substr($0, 1, at - 1) ENVIRON["TITLE"] substr($0, at + 9)
            at = index($0, "{{menu}}");  if (at) $0 = substr($0, 1, at - 1) ENVIRON["MENU"] substr($0, at + 8)
            print
        }
    ' "$page" "$source/layout.html" >"$destination/$name.html"
    echo "generated $name.html"
done
