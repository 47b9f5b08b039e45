//! The scripts by which shells complete `viaduct`'s command line.

use std::process::{Command, Output};

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("text")
}

fn completion(shell: &str) -> Output {
    let mut line = Command::new(env!("CARGO_BIN_EXE_viaduct"));
    line.args(["completion", shell]).output().expect("it runs")
}

fn script(shell: &str) -> String {
    let out = completion(shell);
    assert_eq!(out.status.code(), Some(0), "{}", text(out.stderr));
    text(out.stdout)
}

/// What bash offers in place of the last word, sorted.
fn bash_offers(script: &str, words: &[&str]) -> Vec<String> {
    const ASK: &str = r#"
        eval "$SCRIPT" || exit 1
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        spec=$(complete -p viaduct) || exit 1
        set -- "${spec#* -F }" "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
        "${1%% *}" viaduct "$2" "$3"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let mut bash = Command::new("bash");
    bash.env("SCRIPT", script);
    bash.args(["--norc", "-c", ASK, "bash"]).args(words);
    let out = bash.output().expect("bash is there");
    assert_eq!(text(out.stderr), "");
    assert!(out.status.success(), "{words:?}");
    let offers = text(out.stdout);
    let mut offers: Vec<_> = offers.split_whitespace().map(str::to_owned).collect();
    offers.sort_unstable();
    offers
}

#[test]
fn bash_completes_commands_and_options() {
    let script = script("bash");
    for (words, offers) in [
        (&["viaduct", "res"][..], &["resize"][..]),
        (&["viaduct", "re"], &["rebalance", "resize"]),
        (&["viaduct", "node", "un"], &["uncordon"]),
        (&["viaduct", "resize", "--vc"], &["--vcpus"]),
        (&["viaduct", "vcpu", "move", "--t"], &["--timeout", "--to"]),
        (&["viaduct", "selftest", "--j"], &["--json", "--junit"]),
        (&["viaduct", "fly"], &[]),
        // Not "direct", which help hides.
        (&["viaduct", "d"], &["down"]),
    ] {
        assert_eq!(bash_offers(&script, words), offers, "{words:?}");
    }
}

#[test]
fn other_shells_have_a_script_and_unknown_ones_a_line() {
    assert!(script("zsh").starts_with("#compdef viaduct\n"));
    assert!(script("fish").contains("complete -c viaduct"));
    let out = completion("cmd");
    assert_eq!(out.status.code(), Some(125));
    let said = text(out.stderr);
    assert!(said.contains("bash") && said.lines().count() == 1, "{said}");
}
