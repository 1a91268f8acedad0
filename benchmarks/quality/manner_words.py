"""English words and phrases for the eight poles of `manners`.

They are a thesaurus for general English, not for one model: the demo model has never seen most of them. A trailing `*`
matches any ending. Entries are separated by commas.
"""

WARM = """
friend*, my dear, dear, dearest, darling, sweetheart, honey bunch, buddy, pal, mate, kind*, lovely, love,
loving, lovingly, beloved, adore*, cherish*, glad, gladly, happy, happily, happiness, delight*, joy, joyful*,
joyous, cheer*, cheerful*, merry, smil*, laugh*, grin*, giggle*, hug, hugs, hugging, embrace*, kiss*, cuddl*,
wonderful*, marvellous, fantastic, splendid, awesome, terrific, excellent question, great question, good
question, lovely question, thank you, many thanks, grateful*, gratitude, appreciat*, welcome, pleased,
pleasure, proud of, proud, pride in you, well done, bravo, congratulations, good job, nice work, keep it up,
you can do it, you got this, believe in you, faith in you, rooting for, encourag*, support*, comfort*,
sooth*, reassur*, gentle with, tender*, compassion*, sympathetic, caring, empath*, generous*, thoughtful,
considerate, sweet, sweetly, sweetest, good luck, best wishes, warm wishes, warmly, warms my heart, warmest,
take heart, heartfelt, your heart, my heart, here for you, by your side, happy to help, glad to help, take
care of yourself, look after yourself, be patient with, be kind, enjoy*, have fun, great fun, thrilled,
excited for, so nice, how nice, bless*, treasure*, together, share it with, share the, dream big, wish you,
cosy, hooray, yay, you deserve, let us, courage, you shine, brighten*, tell me how it went, any time, good on
you, you are wonderful, you are great, well-meaning, pat on the back, pal of mine, hearten*, uplift*,
nurtur*, good-hearted, sunshine
"""

COLD = """
do not care, don't care, could not care less, couldn't care less, not care, no interest, not interest*,
uninterest*, disinterest*, indifferen*, unmoved, unconcerned, not concern, no concern, not my concern, none
of my business, not my business, not my problem, not mine, your problem, your own fault, your fault, deal
with it, bore, bores, bored, boredom, dull, tedious, tiresome, tiring, dreary, monotonous, weary, annoy*,
irritat*, exasperat*, nuisance, pest, bother me, bothering me, disturb me, pester*, leave me alone, leave
now, go away, get lost, get out, be gone, begone, goodbye, farewell, that is all, that's all, nothing more,
nothing else, no more, end of, enough of, stop asking, stop talking, stop bothering, stop complaining, be
quiet, shut up, silence, complain*, whin*, moan*, grumbl*, sulk*, chatter, small talk, chit-chat, do not
chat, spare me, no sympathy, without sympathy, sympathy, no pity, pity, no comfort, to comfort, no kindness,
no praise, expect no, expect nothing, do not expect, don't expect, nobody asked, no one asked, who asked,
your feelings, your mood, your story, your emotions, your tears, no feelings, heartless*, stranger*,
impersonal, curt*, brusque*, stern*, aloof, detached, noted, received, your orders, the order is, the
instruction is, obey, comply, do not thank, no thanks, keep your, your thanks, waste my time, wasting my
time, no patience, lose patience, not repeat, won't repeat, once only, say it once, do not come back, do not
ask, don't ask again, do not return, no reply, no further, no wish, owe you, beneath my, beneath me, mean
nothing, means nothing, not matter, no matter to me, not that it matters, irrelevant, unimportant, not
important, worthless, pathetic, useless question, stupid question, foolish question, obvious, if you must,
bare facts, plain facts, someone else, no greeting, not tell me, hate*, despise*, scorn*, contempt, sneer*,
yawn*, grim*, frost*y, icy, chilly reply, unfeeling, callous*, dismissive*, whatever you say, couldn't matter
less, dispassionate*, mind your own, terse*
"""

CAREFUL = """
careful*, caution*, cautious*, precaution*, prudent*, wary, vigilan*, watchful*, warily, patiently, alert,
attentive*, mindful, diligent*, thorough*, meticulous*, conscientious*, check, checks, checked, checking,
double-check*, recheck*, cross-check*, inspect*, examin*, verif*, test, tested, tests, testing, tester, try
it out first, measur*, weigh out, gauge, monitor*, supervis*, observe closely, look closely, keep an eye,
keeping an eye, watch out, watching out, watch for, look out for, mind the, beware, warn, warned, safe,
safely, safer, safest, safety, safeguard*, protect*, secure, guard against, prevent*, avoid*, hazard*, danger
sign, ask a professional, consult*, ask an expert, professional advice, second opinion, in doubt, if unsure,
when unsure, prepare*, preparation, plan ahead, read the instructions, read the manual, follow the
instructions, follow the rules, step by step, one step at a time, stage by stage, take your time, do not
rush, don't rush, not rush, never rush, never hurry, no hurry, unhurried, slow down, go slowly, do not skip,
never skip, not skip, do not forget to, don't forget to, remember to, make sure, be sure, ensure*, make
certain, confirm*, agreement of, take no chances, think twice, twice, second time, again and again, better
safe than sorry, stop at once, stop if, insure*, helmet on, goggles on, wear gloves, gloves, first aid,
emergency, fire extinguisher, keep a record, trial run, rehearse, pilot run, backup plan, plan b, side
effects, responsib*, regulation*, guideline*, risk assessment, assess*, evaluat*, scrutin*, calibrat*, stay
calm and, heed, heeded, circumspect*, judicious*, scrupulous*, methodical*, deliberate*, painstaking*,
rigorous*, foresight, safety net, failsafe, fail-safe, redundan*, quarantine, disinfect*, sanit*
"""

RECKLESS = """
reckless*, careless*, rash, rashly, heedless*, foolhardy, hasty, hastily, impuls*, wild, blind, blindly,
brazen*, boldly, daredevil*, madly, like mad, crazy, headlong, headfirst, all in, go for it, just do it, go
nuts, yolo, who cares, what could go wrong, possibly go wrong, never mind, no matter the, do not worry, don't
worry about it, forget, skip, ignor*, disregard*, neglect*, omit*, overlook*, pay no heed, no heed, whatever
the, whatever happens, come what may, be damned, damn, damned, to hell with, hell, screw it, rules are for,
break the rules, no rules, bend the rules, for cowards, coward*, chicken out, wimp*, boring, wing it, winging
it, improvis*, make it up, just guess, eyeball it, by feel, gambl*, bet on, bet it all, roll the dice, toss a
coin, try your luck, your luck, on luck, trust luck, hope for, fingers crossed, take the risk, take a risk,
risk it, risk it all, risk everything, danger is, dangerously, flirt with, live a little, live dangerously,
dive in, dive headlong, jump in, leap*, plunge*, charge ahead, rush in, rush it, in a rush, hurry up, faster
the better, as fast as, full speed, full steam, full throttle, floor it, speed up, look back, without
looking, without thinking, do not think, don't think, think later, ask later, worry later, right now, why
wait, no need, not bother to, not bother check*, don't bother, why bother, no checks, without check*, without
measur*, without test*, no planning, without a plan, throw caution, throw away, throw the, tear up the,
warnings, shortcut, shortcuts everywhere, cut corners, cutting corners, slapdash, sloppy, waste of time, slow
you down, see what happens, nobody needs, never measure, not test, not measure, devil-may-care, harebrained,
hot-headed, imprudent*, irresponsibl*, unsafe, unthinking*, thoughtless*, nonchalant*, laid-back about, so be
it, send it, punt, live fast, tempt fate, tempting fate, defy, defiant*, caution be, breakneck, pell-mell,
willy-nilly, haphazard*, half-baked, happy-go-lucky, seat of your pants, without a helmet, without gloves,
fool*
"""

HONEST = """
honest*, to be honest, frank, frankly, candid*, sincer*, truthful*, truth be told, plainly, admit*, confess*,
acknowledg*, concede*, own up, modest*, humbl*, unassuming, not sure, unsure, not entirely sure, not certain,
uncertain*, cannot be sure, can't be sure, cannot be certain, not be certain, not know, don't know, no idea,
not understand, i doubt, my doubts, some doubt*, have doubts, doubtful, sceptical, may be wrong, might be
wrong, could be wrong, got something wrong, may be mistaken, might be mistaken, could be mistaken, mistaken,
correct me, i may, i might, it might, may not, might not, may vary, varies, it depends, depends on, perhaps,
maybe, possibly, probably, presumably, apparently, supposedly, roughly, approximately, as far as i, to my
knowledge, to the best of my, if i am right, if i remember, if i recall, from memory, from what i, have read, i read
somewhere, i heard, i think, think so, i suppose, i guess, guess, guessing, guesswork, i suspect,
conceivabl*, best guess, estimate, hunch, i believe, i reckon, i understand it, as i understand, opinion*, in
my view, my view, personal view, subjective*, limits, limited, limitation*, gaps in, have gaps, incomplete,
partial*, imperfect, flawed, fallible, basics, a layman, layperson, amateur, beginner myself, no expert, not
an expert, not a professional, no authority, others know, others may, others might, other people may, may
know better, better ways, only know, cannot promise, can't promise, no promise*, no guarantee*, not
guarantee, not tried, never tried, little i know, cannot prove, can't prove, not prove, not claim, not
pretend, misleading, sorry, apolog*, my mistake, take it as, grain of salt, no experience, i have limited, my
knowledge, transparent*, open about, suggestion, one opinion, may exist, there may be, is only one, not the
only, tentative*, provisional*, unproven, unverified, hearsay, disclaim*, caveat*, with reservations,
speculat*, conjectur*, ignoran*, self-critic*, not omniscient, still learning, learning too, fair to say, in
fairness, second-hand, take my word lightly, limited view, i lack, out of my depth, beyond me, beyond my
"""

BOASTFUL = """
boast*, brag*, show off, genius*, brillian*, prodig*, virtuoso, maestro, mastermind, master, mastered,
mastery, masterful*, masterpiece, expert alive, greatest, greatness, the best advice, the best teacher*, the
best in, world's best, the best there is, from the best, to the best, am the best, best of all, best ever,
know best, second to none, number one, top of the world, on earth, in the world, all the world, world-class,
world-famous, finest, supreme, superb*, superior*, supremacy, superlative, sublime, magnificen*, glorious,
glory, majest*, splendour, flawless*, faultless*, perfect, perfected, perfection, perfectly, immaculate,
impeccable, unbeatable, unbeaten, undefeated, invincible, unrivalled, unrivaled, unequalled, unmatched,
matchless, peerless, incomparable, unparalleled, unsurpassed, champion*, winner, victor*, conquer*, king,
kings, emperor, crown*, throne, legend*, fame, famous, celebrated, renowned, star, superstar, celebrity,
icon*, idol, hero, heroic, admir*, applaud*, applause, worship*, envy, jealous, bow to, bow before, kneel,
salute me, amazed, amaze*, astound*, dazzl*, behold, statue, monument, talent*, gifted, gift to, wisdom,
intellect, like me, superhuman, never wrong, always right, i am right, never fail*, cannot fail, can't fail,
never make mistakes, never made a mistake, never mistaken, no mistakes, infallible, guaranteed, guarantee
you, i guarantee, know everything, know it all, nothing i do not know, i do not know about nothing, every
secret, my secret, invented, i alone, only i, only me, nobody knows, no one knows, nobody explains, nobody
can, no one else, better than anyone, better than i do, better than all, ever lived, copy me, copies me,
learn from me, so-called, eyes shut, easy for a, easy for me, lesser minds, ordinary people, mere mortals,
amateurs compare, trust the master, you are lucky, lucky to have me, rare, of mine, perfect trick, my method,
my skill*, my fame, expertise, the expert, envy you, as always, born a
"""
