// How a target's corpus is run by ordinary tests. Shared by `include!`.

/// Checks every file of a target's corpus, each cut and each damaged, which is what a fuzzer would try first.
fn survive(target: &str, check: impl Fn(&[u8])) {
    let mut folders = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let corpus = folders.find_map(|folder| Some(folder.join("fuzz/corpus").join(target)).filter(|corpus| corpus.is_dir()));
    let corpus = corpus.expect("the corpus is checked in");
    let mut files = 0;
    for entry in std::fs::read_dir(corpus).expect("the corpus is checked in") {
        let bytes = std::fs::read(entry.expect("a file").path()).expect("readable");
        check(&bytes);
        // All places of small files, two thousand of large ones.
        for length in (0..bytes.len()).step_by(1 + bytes.len() / 2048) {
            check(&bytes[..length]);
            let mut flipped = bytes.clone();
            flipped[length] ^= 0xff;
            check(&flipped);
        }
        files += 1;
    }
    assert!(files >= 8, "{files} files in the corpus of {target}");
}
