// Prints the digests that tests/tar.rs expects: each family of entries, written by archive/tar as containerd writes layers.
// Run with `go run golden.go`.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"strings"
	"time"
)

type entry struct {
	name  string
	flag  byte
	link  string
	mode  int64
	uid   int
	gid   int
	mtime int64
	size  int64
	body  string
	major int64
	minor int64
	xattr map[string]string
}

func family(name string, entries []entry) {
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	for _, e := range entries {
		h := &tar.Header{Typeflag: e.flag, Name: e.name, Linkname: e.link, Mode: e.mode, Uid: e.uid, Gid: e.gid,
			ModTime: time.Unix(e.mtime, 0), Devmajor: e.major, Devminor: e.minor, Format: tar.FormatPAX}
		if e.flag == tar.TypeReg {
			h.Size = int64(len(e.body))
		}
		for k, v := range e.xattr {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		if e.size > 0 {
			h.Size = e.size
		}
		if err := tw.WriteHeader(h); err != nil {
			panic(name + ": " + err.Error())
		}
		if e.size == 0 {
			tw.Write([]byte(e.body))
		}
	}
	if entries[len(entries)-1].size == 0 {
		if err := tw.Close(); err != nil {
			panic(err)
		}
	}
	fmt.Printf("(\"%s\", \"%x\"),\n", name, sha256.Sum256(out.Bytes()))
}

// repeat builds a name of n bytes with a slash after every step bytes.
func repeat(n, step int) string {
	var b strings.Builder
	for i := 1; i <= n; i++ {
		if i%step == 0 && i != n {
			b.WriteByte('/')
		} else {
			b.WriteByte('a')
		}
	}
	return b.String()
}

func main() {
	const day = 1700000000
	family("kinds", []entry{
		{name: "dir/", flag: tar.TypeDir, mode: 0o755, mtime: day},
		{name: "dir/file", flag: tar.TypeReg, mode: 0o644, uid: 1000, gid: 100, mtime: day, body: "hello\n"},
		{name: "dir/empty", flag: tar.TypeReg, mode: 0o4755, mtime: 0},
		{name: "dir/block", flag: tar.TypeReg, mode: 0o600, mtime: 1, body: strings.Repeat("x", 512)},
		{name: "dir/hard", flag: tar.TypeLink, link: "dir/file", mode: 0o644, uid: 1000, gid: 100, mtime: day},
		{name: "dir/link", flag: tar.TypeSymlink, link: "../file", mode: 0o777, mtime: day},
		{name: "dir/null", flag: tar.TypeChar, mode: 0o666, major: 1, minor: 3, mtime: day},
		{name: "dir/disk", flag: tar.TypeBlock, mode: 0o660, major: 259, minor: 1048575, gid: 6, mtime: day},
		{name: "dir/pipe", flag: tar.TypeFifo, mode: 0o1777, mtime: day},
	})
	for _, step := range []int{1 << 20, 7, 50, 101} {
		var files, dirs, links, hard, capable []entry
		for n := 1; n <= 1100; n++ {
			name := repeat(n, step)
			files = append(files, entry{name: name, flag: tar.TypeReg, mode: 0o644, mtime: day, body: "."})
			dirs = append(dirs, entry{name: name + "/", flag: tar.TypeDir, mode: 0o755, mtime: day})
			links = append(links, entry{name: "l", flag: tar.TypeSymlink, link: name, mode: 0o777, mtime: day})
			hard = append(hard, entry{name: name, flag: tar.TypeLink, link: name, mode: 0o644, mtime: day})
			capable = append(capable, entry{name: name, flag: tar.TypeReg, mode: 0o755, mtime: day, body: ".",
				xattr: map[string]string{"security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}})
		}
		family(fmt.Sprintf("files %d", step), files)
		family(fmt.Sprintf("dirs %d", step), dirs)
		family(fmt.Sprintf("links %d", step), links)
		family(fmt.Sprintf("hard %d", step), hard)
		family(fmt.Sprintf("capable %d", step), capable)
	}
	var odd []entry
	for _, name := range []string{"é", "dir/é/x", "\xff\xfe", strings.Repeat("é", 60), "a b\nc=d", strings.Repeat("x/", 49) + "é" + strings.Repeat("y", 30)} {
		odd = append(odd, entry{name: name, flag: tar.TypeReg, mode: 0o644, mtime: day, body: "."},
			entry{name: name + "/", flag: tar.TypeDir, mode: 0o755, mtime: day},
			entry{name: "s", flag: tar.TypeSymlink, link: name, mode: 0o777, mtime: day})
	}
	family("odd names", odd)
	var numbers []entry
	for _, id := range []int{0, 65534, 2097151, 2097152, 4294967294} {
		for _, mtime := range []int64{0, day, 8589934591, 8589934592, -1, -62135596800 + 1} {
			numbers = append(numbers, entry{name: "n", flag: tar.TypeReg, mode: 0o7777, uid: id, gid: id, mtime: mtime})
		}
	}
	family("numbers", numbers)
	family("size limit", []entry{{name: "big", flag: tar.TypeReg, mode: 0o644, mtime: day, size: 8589934591}})
	family("over size limit", []entry{{name: "big", flag: tar.TypeReg, mode: 0o644, mtime: day, size: 8589934592}})
	family("xattrs", []entry{{name: "f", flag: tar.TypeReg, mode: 0o644, mtime: day, uid: 2097152, xattr: map[string]string{
		"user.a": "", "user.b": "x\n=\x00y", "user.ä": "z", "trusted.t": strings.Repeat("v", 960)}}})
	family("whiteouts", []entry{
		{name: "a/.wh.b", flag: tar.TypeReg}, {name: ".wh.top", flag: tar.TypeReg}, {name: "a/.wh..wh..opq", flag: tar.TypeReg}})
}
