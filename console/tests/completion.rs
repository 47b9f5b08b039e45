//! The scripts by which shells complete `viaduct`'s command line.

use std::io::Write as _;
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

/// What a shell offers, given the script and its way to be asked.
fn offers(shell: &mut Command, script: &str) -> Vec<String> {
    let out = shell.env("SCRIPT", script).output().expect("it is there");
    assert_eq!(text(out.stderr), "");
    assert!(out.status.success(), "{shell:?}");
    let lines = text(out.stdout);
    // Behind a tab, fish says what it is.
    let offers = lines.lines().filter_map(|line| line.split('\t').next());
    let mut offers: Vec<_> = offers.map(str::trim).map(str::to_owned).collect();
    offers.retain(|offer| !offer.is_empty());
    offers.sort_unstable();
    offers
}

fn bash_offers(script: &str, words: &[&str]) -> Vec<String> {
    const ASK: &str = r#"
        eval "$SCRIPT" || exit 1
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        spec=$(complete -p viaduct) || exit 1
        set -- "${spec#* -F }" "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
        "${1%% *}" viaduct "$2" "$3"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let mut bash = Command::new("bash");
    offers(bash.args(["--norc", "-c", ASK, "bash"]).args(words), script)
}

fn fish_offers(script: &str, words: &[&str]) -> Vec<String> {
    const ASK: &str = r#"echo "$SCRIPT" | source; and complete -C "$argv""#;
    let mut fish = Command::new("fish");
    offers(fish.args(["--no-config", "-c", ASK]).args(words), script)
}

/// zsh completes only on a terminal: one zsh asks another, which prints what it
/// would offer.
fn zsh_offers(script: &str, words: &[&str]) -> Vec<String> {
    const SET_UP: &str = r#"
        PROMPT= RPROMPT=
        autoload -Uz compinit && compinit -u -D && eval "$SCRIPT" || exit
        compadd () {
            local -a offers
            case " ${(j: :)@[1,(i)(-|--)]}" in
                # It only sorts out what to offer.
                *" -"[OAD]*) builtin compadd "$@"; return ;;
            esac
            builtin compadd -A offers "$@"
            (( $#offers )) && print -rl -- "<offer>"${^offers}
            return 1
        }
        ended () { print -r -- "<en""d>"; exit }
        comppostfuncs=(ended)
        bindkey "^I" complete-word
        print "<rea""dy>""#;
    const ASK: &str = r#"
        zmodload zsh/zpty && zpty asked zsh -f -i || exit 1
        zpty -w asked 'eval "$SET_UP"'
        zpty -r asked out '*<ready>*' || exit 1
        zpty -n -w asked "$*"$'\t'
        zpty -r asked out '*<end>*' || exit 1
        out=${out//$'\r'}
        for line in ${(M)${(f)out}:#*<offer>*}; do print -r -- ${line##*<offer>}; done"#;
    // It would wait for ever for a shell that a broken script has stopped.
    let mut zsh = Command::new("timeout");
    zsh.env("SET_UP", SET_UP);
    zsh.args(["120", "zsh", "-f", "-c", ASK, "zsh"]);
    offers(zsh.args(words), script)
}

/// Whether this host has a shell; `scripts/test` installs those that it may.
fn has(shell: &str) -> bool {
    let found = Command::new(shell).arg("--version").output();
    let is_there = found.is_ok_and(|out| out.status.success());
    if !is_there {
        // Past what keeps the output of tests that pass.
        let line = format!("{shell} is not installed: its completion is not tested\n");
        std::io::stderr()
            .write_all(line.as_bytes())
            .expect("stderr");
    }
    is_there
}

#[test]
fn shells_complete_commands_and_options() {
    type Offers = fn(&str, &[&str]) -> Vec<String>;
    let shells: [(&str, Offers); 3] = [
        ("bash", bash_offers),
        ("zsh", zsh_offers),
        ("fish", fish_offers),
    ];
    assert!(has("bash"));
    for (shell, asked) in shells.iter().filter(|(shell, _)| has(shell)) {
        let script = script(shell);
        for (words, offers) in [
            (&["viaduct", "res"][..], &["resize"][..]),
            (&["viaduct", "re"], &["rebalance", "resize"]),
            (&["viaduct", "node", "un"], &["uncordon"]),
            (&["viaduct", "resize", "--vc"], &["--vcpus"]),
            (&["viaduct", "vcpu", "move", "--t"], &["--timeout", "--to"]),
            (&["viaduct", "job", "cancel", "--f"], &["--force"]),
            (&["viaduct", "selftest", "--j"], &["--json", "--junit"]),
            (&["viaduct", "fly"], &[]),
            // Not "direct", which help hides.
            (&["viaduct", "d"], &["down"]),
        ] {
            assert_eq!(asked(&script, words), offers, "{shell}: {words:?}");
        }
    }
}

#[test]
fn other_shells_have_a_script_and_unknown_ones_a_line() {
    for (shell, word) in [
        ("elvish", "edit:completion"),
        ("powershell", "Register-ArgumentCompleter"),
    ] {
        assert!(script(shell).contains(word), "{shell}");
    }
    let out = completion("cmd");
    assert_eq!(out.status.code(), Some(125));
    let said = text(out.stderr);
    assert!(said.contains("bash") && said.lines().count() == 1, "{said}");
}
